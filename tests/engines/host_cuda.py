"""A device whose memory is the host's: the device backend computes for real, with ONNX Runtime on the CPU.

It is as late as a device may be: what is enqueued is carried out when the host waits for it, or for something that
waits for it, and no sooner. What is not ordered by a stream, an event or the host's wait gives wrong numbers. What is
captured is kept and carried out again at every launch, with the contents of memory at that time.
"""

from __future__ import annotations

import ctypes
import dataclasses
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from dspark_runtime.backends.cuda import Bytes, Pieces
from dspark_runtime.backends.device_shapes import PassRanges
from dspark_runtime.backends.ort_device import OrtContext, OrtPlan
from dspark_runtime.bundle.files import BundleFiles
from dspark_runtime.bundle.manifest import GraphEntry

_ALIGNMENT = 256
Step = Callable[[], Any]


@dataclasses.dataclass
class _Mark:
    """One record of an event on ``stream``; ``time`` is when it happened."""

    stream: int
    time: float | None = None

    def happen(self) -> None:
        self.time = time.perf_counter()


class HostCuda:
    """See :class:`dspark_runtime.backends.cuda.Cuda`. It counts launches, compactions and waits of the host."""

    def __init__(self, captures: bool = True) -> None:
        self.captures = captures
        self.allocated = self.launched = self.compacted = self.waited = 0
        self.lanes: dict[int, str] = {}
        self._memory: dict[int, npt.NDArray[np.uint8]] = {}
        self._freed: list[npt.NDArray[np.uint8]] = []  # what is enqueued may still use it
        self._queues: dict[int, deque[Step]] = defaultdict(deque)
        self._marks: dict[int, _Mark | None] = {}
        self._capturing: dict[int, list[Step]] = {}
        self._graphs: dict[int, list[Step]] = {}
        self._lock = threading.RLock()

    def stream(self, lane: str) -> int:
        self.lanes[len(self.lanes) + 1] = lane
        return len(self.lanes)

    def event(self, timed: bool = False) -> int:
        self._marks[len(self._marks) + 1] = None
        return len(self._marks)

    def allocate(self, size: int) -> int:
        self.allocated += 1
        raw = np.zeros(size + _ALIGNMENT, np.uint8)
        address = -(-raw.ctypes.data // _ALIGNMENT) * _ALIGNMENT
        self._memory[address] = raw
        return address

    def free(self, memory: int) -> None:
        self._freed.append(self._memory.pop(memory))

    def pinned(self, size: int) -> Bytes:
        return np.zeros(size, np.uint8)

    def copy_in(self, device: int, host: Bytes, stream: int) -> None:
        self.do(lambda: ctypes.memmove(device, host.ctypes.data, host.nbytes), stream)

    def copy_out(self, host: Bytes, device: int, stream: int) -> None:
        self.do(lambda: ctypes.memmove(host.ctypes.data, device, host.nbytes), stream)

    def copy_rows(self, to: Pieces, source: Pieces, width: int, rows: int, stream: int) -> None:
        def copy() -> None:
            for row in range(rows):
                ctypes.memmove(to[0] + row * to[1], source[0] + row * source[1], width)

        self.do(copy, stream)

    def compact(
        self,
        tables: tuple[int, int, int],
        tensors: int,
        columns: int,
        sources: int,
        numbers: npt.NDArray[np.int32],
        stream: int,
    ) -> None:
        self.compacted += 1
        self.do(lambda: _compact(tables, tensors, columns, sources, numbers), stream)

    def record(self, event: int, stream: int) -> None:
        mark = self._marks[event] = _Mark(stream)
        self.do(mark.happen, stream)

    def wait(self, stream: int, event: int) -> None:
        if (mark := self._marks[event]) is not None:
            self.do(lambda: self._until(mark), stream)

    def synchronize(self, event: int) -> None:
        assert not self._capturing, "the host may not wait while a graph is captured"
        self.waited += 1
        if (mark := self._marks[event]) is not None:
            self._until(mark)

    def elapsed(self, since: int, until: int) -> float:
        begin, end = self._marks[since], self._marks[until]
        assert begin and end and begin.time and end.time, "time between events that have not happened"
        return (end.time - begin.time) * 1e3

    def begin_capture(self, stream: int) -> None:
        self._capturing[stream] = []

    def end_capture(self, stream: int) -> int:
        captured = self._capturing.pop(stream)
        assert captured
        if not self.captures:
            return 0
        self._graphs[len(self._graphs) + 1] = captured
        return len(self._graphs)

    def launch(self, graph: int, stream: int) -> None:
        self.launched += 1
        for step in self._graphs[graph]:
            self.do(step, stream)

    def do(self, step: Step, stream: int) -> None:
        """Enqueue ``step``, or keep it where a graph is captured."""
        with self._lock:
            self._capturing.get(stream, self._queues[stream]).append(step)

    def _until(self, mark: _Mark) -> None:
        with self._lock:
            while mark.time is None:
                self._queues[mark.stream].popleft()()


def _compact(
    tables: tuple[int, int, int], tensors: int, columns: int, sources: int, numbers: npt.NDArray[np.int32]
) -> None:
    count, to, sequence, capacity = map(int, numbers)
    pointers = _at(tables[0], tensors, np.uint64)
    heads, widths = _at(tables[1], tensors, np.int32), _at(tables[2], tensors, np.int32)
    rows = _at(sources, count, np.int64)
    assert columns == max(h * w for h, w in zip(heads, widths, strict=True))
    for pointer, head_count, width in zip(pointers.tolist(), heads.tolist(), widths.tolist(), strict=True):
        halves = _at(pointer, (sequence + 1) * head_count * capacity * width, np.uint16)
        own = halves.reshape(sequence + 1, head_count, capacity, width)[sequence]
        own[:, to : to + count] = own[:, rows]


class HostPlan(OrtPlan):
    """A graph in ONNX Runtime on the CPU whose passes can be captured; ``profiles`` are those of its contexts."""

    def __init__(self, files: BundleFiles, graph: GraphEntry, cuda: HostCuda) -> None:
        for_all = tuple(  # what an engine is compiled from draws for every sequence
            dataclasses.replace(spec, shape=tuple("batch" if dim == "drawn" else dim for dim in spec.shape))
            for spec in graph.outputs
        )
        super().__init__(files.path(graph.file), graph.model_copy(update={"outputs": for_all}), "cpu", 0, 0)
        self.stream = None
        self._cuda = cuda
        self.profiles: list[int] = []

    def context(self, profile: int, stream: int) -> OrtContext:
        self.profiles.append(profile)
        return super().context(profile, stream)

    def enqueue(self, context: OrtContext, stream: int) -> None:
        """As with TensorRT, shapes and addresses are those of now, whatever the context is told later."""
        shapes, addresses, run = dict(context._shapes), dict(context._addresses), super().enqueue

        def later() -> None:
            context._shapes, context._addresses = dict(shapes), dict(addresses)
            run(context, stream)

        self._cuda.do(later, stream)


def host_plan(files: BundleFiles) -> Callable[[GraphEntry, PassRanges, Any, int], HostPlan]:
    """What a device backend loads graphs with."""
    return lambda graph, ranges, cuda, stream: HostPlan(files, graph, cuda)


def _at(address: int, count: int, dtype: Any) -> npt.NDArray[Any]:
    size = count * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype)
