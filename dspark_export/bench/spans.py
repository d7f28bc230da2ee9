"""Records what the host and every GPU stream did, and when, while texts are generated.

    cuda = SpannedCuda(CudaBindings())  # given to a backend whose plans are SpannedPlan
    host = HostSpans(device=True)
    bundle.with_observer(host).generate(...)
    spans = [*host.spans, *cuda.spans()]

On the device, events around everything that is enqueued take the time; nothing waits for them before ``spans()``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dspark_runtime.backends.cuda import Cuda
from dspark_runtime.backends.device import Plan
from dspark_runtime.decoding.observer import Observer
from dspark_runtime.decoding.round import Flight
from dspark_runtime.decoding.sequence import Chunk

HOST = "host"
BESIDE = "text, chunks"
_clock = time.perf_counter


@dataclass(frozen=True)
class Span:
    """``lane`` was busy with ``what`` from ``start`` to ``end``, in seconds of the host's clock."""

    lane: str
    what: str
    start: float
    end: float


class SpannedCuda:
    """A :class:`Cuda` that times what it enqueues, except what is captured; everything else goes to ``cuda``."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._lanes: dict[int, str] = {}
        self._capturing: set[int] = set()
        self._found: list[tuple[int, str, int, int]] = []
        self._origin: tuple[int, float] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cuda, name)

    def stream(self, lane: str) -> int:
        """See :class:`Cuda`."""
        stream = self._cuda.stream(lane)
        self._lanes[stream] = lane
        return stream

    def begin_capture(self, stream: int) -> None:
        """See :class:`Cuda`."""
        self._capturing.add(stream)
        self._cuda.begin_capture(stream)

    def end_capture(self, stream: int) -> int:
        """See :class:`Cuda`."""
        self._capturing.discard(stream)
        return self._cuda.end_capture(stream)

    def launch(self, graph: int, stream: int) -> None:
        """See :class:`Cuda`."""
        self.take("pass", stream, lambda: self._cuda.launch(graph, stream))

    def copy_in(self, device: int, host: Any, stream: int) -> None:
        """See :class:`Cuda`."""
        self.take("copy in", stream, lambda: self._cuda.copy_in(device, host, stream))

    def copy_out(self, host: Any, device: int, stream: int) -> None:
        """See :class:`Cuda`."""
        self.take("copy out", stream, lambda: self._cuda.copy_out(host, device, stream))

    def copy_rows(self, to: Any, source: Any, width: int, rows: int, stream: int) -> None:
        """See :class:`Cuda`."""
        self.take("move", stream, lambda: self._cuda.copy_rows(to, source, width, rows, stream))

    def compact(self, *rest: Any) -> None:
        """See :class:`Cuda`; the stream comes last."""
        self.take("move", rest[-1], lambda: self._cuda.compact(*rest))

    def take(self, what: str, stream: int, enqueue: Callable[[], None]) -> None:
        """Enqueue something between two events."""
        if stream in self._capturing:
            enqueue()
            return
        if self._origin is None:
            event = self._cuda.event(timed=True)
            self._cuda.record(event, stream)
            self._cuda.synchronize(event)
            self._origin = event, _clock()
        begin, end = self._cuda.event(timed=True), self._cuda.event(timed=True)
        self._cuda.record(begin, stream)
        enqueue()
        self._cuda.record(end, stream)
        self._found.append((stream, what, begin, end))

    def spans(self) -> list[Span]:
        """What was enqueued since the last call; waits for it."""
        found, self._found = self._found, []
        for _, _, _, end in found:
            self._cuda.synchronize(end)
        if self._origin is None:
            return []
        origin, at = self._origin
        return [
            Span(self._lanes[stream], what, *(at + self._cuda.elapsed(origin, e) / 1e3 for e in (begin, end)))
            for stream, what, begin, end in found
        ]


class SpannedPlan:
    """A plan that times its passes; everything else goes to ``plan``."""

    def __init__(self, plan: Plan, cuda: SpannedCuda) -> None:
        self._plan, self._watch = plan, cuda

    def __getattr__(self, name: str) -> Any:
        return getattr(self._plan, name)

    def enqueue(self, context: Any, stream: int) -> None:
        """See :class:`Plan`."""
        self._watch.take("pass", stream, lambda: self._plan.enqueue(context, stream))


class HostSpans(Observer):
    """``spans``: what the host does in every round of the loops it watches.

    ``device``: passes run beside the host, which only launches them; otherwise the host itself runs them.
    """

    def __init__(self, device: bool = False) -> None:
        self.spans: list[Span] = []
        self._pass = "launch" if device else "pass"

    def started(self, flight: Flight) -> None:
        """See :class:`Observer`."""
        self._add("propose", flight.began, flight.drafted)
        self._add("fill", flight.drafted, flight.filled)
        self._add(self._pass, flight.filled, flight.started)

    def finished(self, flight: Flight) -> None:
        """See :class:`Observer`."""
        self._add("wait", flight.waited, flight.verified)
        self._add("commit", flight.verified, flight.committed)

    def settled(self, chunks: Sequence[Chunk], began: float, ended: float) -> None:
        """See :class:`Observer`."""
        self._add(BESIDE, began, ended)

    def _add(self, what: str, start: float, end: float) -> None:
        self.spans.append(Span(HOST, what, start, end))
