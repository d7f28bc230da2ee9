"""A CUDA that computes nothing: it records who reads and writes what, and finds accesses that nothing orders.

Every stream, and the host, is a line of events with a vector clock. An access must happen after the last write of the
same bytes, and a write after their last reads as well; an event that was recorded and waited for orders two lines.
``forget`` names waits that are left out, ``host`` or the lane of the stream that waits: a check that finds no race then
would never find one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from dspark_runtime.backends.cuda import Bytes, Pieces
from dspark_runtime.backends.plugin_launches import Launch

HOST = 0
Clock = dict[int, int]


@dataclass(frozen=True)
class Access:
    """Bytes [start, end) read or written by one operation."""

    start: int
    end: int
    writes: bool


@dataclass
class _Past:
    access: Access
    line: int
    time: int
    what: str


@dataclass
class RecordedCuda:
    """See the module's text. ``races`` lists what nothing ordered; ``calls`` counts calls by name."""

    forget: frozenset[str] = frozenset()
    races: list[str] = field(default_factory=list)
    calls: Counter[str] = field(default_factory=Counter)
    log: list[str] = field(default_factory=list)
    copied: list[int] = field(default_factory=list)  # bytes of every copy to the host
    lanes: dict[int, str] = field(default_factory=lambda: {HOST: "host"})

    def __post_init__(self) -> None:
        self._clocks: dict[int, Clock] = {HOST: {}}
        self._contents: dict[int, Bytes] = {}
        self._events: dict[int, Clock] = {}
        self._history: list[_Past] = []
        self._end, self._handles = 4096, 0
        self._capturing: dict[int, list[tuple[str, list[Access]]]] = {}
        self._graphs: dict[int, list[tuple[str, list[Access]]]] = {}
        self.memory: dict[int, int] = {}

    # What the backend calls

    def stream(self, lane: str) -> int:
        self._handles += 1
        self._clocks[self._handles] = {}
        self.lanes[self._handles] = lane
        return self._handles

    def event(self, timed: bool = False) -> int:
        self._handles += 1
        self._events[self._handles] = {}
        return self._handles

    def allocate(self, size: int) -> int:
        self.calls["allocate"] += 1
        start, self._end = self._end, self._end + -(-size // 256) * 256
        self.memory[start] = size
        return start

    def free(self, memory: int) -> None:
        del self.memory[memory]

    def pinned(self, size: int) -> Bytes:
        return np.zeros(size, np.uint8)

    def copy_in(self, device: int, host: Bytes, stream: int) -> None:
        self._contents[device] = host.copy()
        self._do("copy_in", stream, [*_of(host, False), Access(device, device + host.nbytes, True)])

    def copy_out(self, host: Bytes, device: int, stream: int) -> None:
        self.copied.append(host.nbytes)
        self._do("copy_out", stream, [Access(device, device + host.nbytes, False), *_of(host, True)])

    def copy_rows(self, to: Pieces, source: Pieces, width: int, rows: int, stream: int) -> None:
        accesses = []
        for row in range(rows):
            start, end = source[0] + row * source[1], to[0] + row * to[1]
            accesses += [Access(start, start + width, False), Access(end, end + width, True)]
        self._do("copy_rows", stream, accesses)

    def compact(
        self,
        tables: tuple[int, int, int],
        tensors: int,
        columns: int,
        sources: int,
        numbers: npt.NDArray[np.int32],
        stream: int,
    ) -> None:
        reads = [Access(memory, memory + self.memory[memory], False) for memory in (*tables, sources)]
        pointers = self._contents[tables[0]].view(np.uint64).tolist()
        caches = [Access(start, start + self.memory[start], True) for start in pointers]
        self._do("compact", stream, [*reads, *caches])

    def record(self, event: int, stream: int) -> None:
        self._say("record", stream)
        self._events[event] = dict(self._clocks[stream])

    def wait(self, stream: int, event: int) -> None:
        self._say("wait", stream)
        if self.lanes[stream] not in self.forget:
            _merge(self._clocks[stream], self._events[event])

    def synchronize(self, event: int) -> None:
        self._say("synchronize", HOST)
        if "host" not in self.forget:
            _merge(self._clocks[HOST], self._events[event])

    def elapsed(self, since: int, until: int) -> float:
        assert all(self._events[event] for event in (since, until)), "time between events that were never recorded"
        return 1.0

    def begin_capture(self, stream: int) -> None:
        self._capturing[stream] = []

    def end_capture(self, stream: int) -> int:
        self._handles += 1
        self._graphs[self._handles] = self._capturing.pop(stream)
        return self._handles

    def launch(self, graph: int, stream: int) -> None:
        self._say("launch", stream)
        self._follow_host(stream)
        for what, accesses in self._graphs[graph]:
            self._happen(what, stream, accesses)

    # What a test or the recorded engine says

    def kernel(self, what: str, stream: int, accesses: list[Access]) -> None:
        """An engine's pass."""
        self._do(what, stream, accesses)

    def host(self, array: npt.NDArray[Any], writes: bool) -> None:
        """The host reads or writes ``array`` now."""
        self._happen("the host", HOST, _of(array, writes))

    def _say(self, what: str, line: int) -> None:
        self.calls[what] += 1
        self.log.append(f"{what} {self.lanes[line]}")

    def _do(self, what: str, stream: int, accesses: list[Access]) -> None:
        self._say(what, stream)
        if stream in self._capturing:
            self._capturing[stream].append((what, accesses))
            return
        self._follow_host(stream)
        self._happen(what, stream, accesses)

    def _follow_host(self, stream: int) -> None:
        """What is enqueued happens after what the host did before."""
        _merge(self._clocks[stream], self._clocks[HOST])

    def _happen(self, what: str, line: int, accesses: Iterable[Access]) -> None:
        clock = self._clocks[line]
        clock[line] = clock.get(line, 0) + 1
        for access in accesses:
            for past in self._history:
                overlap = past.access.start < access.end and access.start < past.access.end
                if not overlap or not (past.access.writes or access.writes):
                    continue
                if past.line != line and clock.get(past.line, 0) < past.time:
                    self.races.append(
                        f"{what} ({self.lanes[line]}) does not wait for {past.what} ({self.lanes[past.line]})"
                    )
            self._history.append(_Past(access, line, clock[line], what))


def _merge(into: Clock, other: Clock) -> None:
    for line, time in other.items():
        into[line] = max(time, into.get(line, 0))


def _of(array: npt.NDArray[Any], writes: bool) -> list[Access]:
    """The memory of a host array, from its first to its last byte, far away from the device's."""
    low, high = np.lib.array_utils.byte_bounds(array)
    return [Access((1 << 60) + low, (1 << 60) + high, writes)] if high > low else []


class RecordedContext:
    """An execution context that keeps what it is told."""

    def __init__(self, profile: int) -> None:
        self.profile = profile
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_input_shape(self, name: str, dims: tuple[int, ...]) -> None:
        self.shapes[name] = tuple(int(dim) for dim in dims)

    def set_tensor_address(self, name: str, address: int) -> None:
        self.addresses[name] = address


class RecordedPlan:
    """An engine whose passes read every input and write every output, and do nothing else."""

    def __init__(self, cuda: RecordedCuda, outputs: dict[str, int]) -> None:
        self._cuda, self._outputs = cuda, outputs
        self.stream: int | None = None
        self.contexts: list[RecordedContext] = []
        self.passes: list[tuple[int, dict[str, tuple[int, ...]], dict[str, int]]] = []

    def require_tensors(self, inputs: set[str], outputs: set[str]) -> None:
        self.names = inputs, outputs

    def context(self, profile: int, stream: int) -> RecordedContext:
        self.contexts.append(RecordedContext(profile))
        return self.contexts[-1]

    def enqueue(self, context: RecordedContext, stream: int) -> None:
        assert set(context.shapes) == self.names[0] and set(context.addresses) == self.names[0] | self.names[1]
        self.passes.append((context.profile, dict(context.shapes), dict(context.addresses)))
        accesses = []
        for name, dims in context.shapes.items():
            width = 2 if name.startswith("past") else 1 if name == "attention_mask" else 8
            start = context.addresses[name]
            accesses.append(Access(start, start + int(np.prod(dims)) * width, name.startswith("past")))
        accesses += [
            Access(context.addresses[n], context.addresses[n] + size, True) for n, size in self._outputs.items()
        ]
        self._cuda.kernel("pass", stream, accesses)


class RecordedKernels:
    """Kernels that verify: each is taken to read and write all memory that it is given."""

    processors = 2

    def __init__(self, cuda: RecordedCuda) -> None:
        self._cuda = cuda

    def run(self, launches: Iterable[Launch], stream: int) -> None:
        for launch in launches:
            given = [value for value in launch.arguments if isinstance(value, int)]
            inside = [(m, size) for m, size in self._cuda.memory.items() if any(m <= g < m + size for g in given)]
            self._cuda.kernel(launch.kernel, stream, [Access(m, m + size, True) for m, size in inside])
