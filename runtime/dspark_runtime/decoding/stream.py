"""The requests of one call: all are admitted as rows become free, and the loop steps until none is left."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence

from dspark_runtime.decoding.loop import DecodingLoop
from dspark_runtime.decoding.request import Request
from dspark_runtime.decoding.sequence import Chunk, Generation, SequenceState


class Stream:
    """Text as it comes: iterate for :class:`Chunk` objects; ``generations`` holds the results at the end.

    Args:
        open_loop: makes the loop that the requests run in.
        requests: may be more than the loop has rows; they wait here.
    """

    def __init__(self, open_loop: Callable[[], DecodingLoop], requests: Sequence[Request]) -> None:
        self._open_loop, self._requests = open_loop, requests
        self._cancelled = False
        self.generations: list[Generation] = []

    def __iter__(self) -> Iterator[Chunk]:
        loop, coming, sequences = self._open_loop(), deque(self._requests), list[SequenceState]()
        try:
            while not self._cancelled:
                while coming and loop.free:
                    sequences.append(loop.admit(coming.popleft()))
                if not loop.busy:
                    break
                yield from loop.step()
            for sequence in sequences:
                if not sequence.finished:
                    yield loop.cancel(sequence)
        finally:
            loop.close()
        for request in coming:
            sequences.append(SequenceState(len(sequences), request, None))
            yield sequences[-1].cancel()
        self.generations = [sequence.generation() for sequence in sequences]

    def cancel(self) -> None:
        """End all texts before the next step; they finish with the reason ``cancelled``. From any thread."""
        self._cancelled = True

    def finish(self) -> list[Generation]:
        """Run to the end; the results."""
        for _ in self:
            pass
        return self.generations
