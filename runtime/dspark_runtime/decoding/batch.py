"""Assigns sequences to cache rows.

A sequence waits, then its prompt is filled, then it runs until its text ends. At all times

* the running sequences occupy the cache rows ``0 .. running - 1``, so that a pass over all of them covers
  contiguous rows;
* the one whose prompt is being filled, if any, occupies the next row;
* waiting sequences have no row yet, but one is kept free for each.

A row given to a sequence is clean: neither the cache nor a drafter knows anything about its previous owner.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from dspark_runtime.decoding.sequence import SequenceState
from dspark_runtime.drafters.base import Drafter
from dspark_runtime.errors import UsageError
from dspark_runtime.speculation.kv_cache import KvCache


class Batch:
    """See the module's text.

    Args:
        cache: of the target, with a row for every sequence there may be.
        drafters: are told which sequences begin, and what rows they go to.
    """

    def __init__(self, cache: KvCache, drafters: Sequence[Drafter]) -> None:
        self.running: list[SequenceState] = []
        self.filling: SequenceState | None = None
        self.waiting: deque[SequenceState] = deque()
        self._cache, self._drafters = cache, drafters

    def __len__(self) -> int:
        return len(self.running) + (self.filling is not None) + len(self.waiting)

    @property
    def free(self) -> int:
        """Rows that another sequence can have."""
        return len(self._cache.lengths) - len(self)

    def admit(self, sequence: SequenceState) -> None:
        """Let a sequence wait for its turn; UsageError if all rows are taken."""
        if not self.free:
            raise UsageError(
                f"all {len(self._cache.lengths)} rows are taken; admit a request when a sequence has ended, or open "
                "the loop with more rows"
            )
        self.waiting.append(sequence)

    def next_prompt(self) -> SequenceState | None:
        """The sequence whose prompt is to be filled, first come first served; None if there is none."""
        if self.filling is None and self.waiting:
            sequence = self.filling = self.waiting.popleft()
            sequence.row = len(self.running)
            self._cache.clear(sequence.row)
            for drafter in self._drafters:
                drafter.reset(sequence.row)
                drafter.begin(sequence.index, sequence.request.prompt)
        return self.filling

    def filled(self) -> None:
        """The prompt is in the cache and the first token is drawn: the sequence runs from now on."""
        if self.filling is not None:
            self.running.append(self.filling)
            self.filling = None

    def retire(self) -> list[SequenceState]:
        """Drop the sequences that have ended; the last running one takes the row of each. Those that had a row."""
        gone = [sequence for sequence in self.running if sequence.finished]
        for sequence in reversed(gone):
            last = self.running.pop()
            if last is not sequence:
                self._move(last, sequence.row)
                self.running[last.row] = last
        if self.filling is not None and self.filling.finished:
            gone.append(self.filling)
            self.filling = None
        if self.filling is not None and self.filling.row != len(self.running):
            self._move(self.filling, len(self.running))
        if any(sequence.finished for sequence in self.waiting):
            self.waiting = deque(sequence for sequence in self.waiting if not sequence.finished)
        return gone

    def _move(self, sequence: SequenceState, row: int) -> None:
        self._cache.replace(row, sequence.row)
        for drafter in self._drafters:
            drafter.move(sequence.row, row)
        sequence.row = row
