"""A device whose memory is the host's: the device backend computes for real, with ONNX Runtime on the CPU.

What is captured is kept and carried out again at every launch, with the contents of memory at that time.
"""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from dspark_runtime.backends.cuda import Bytes
from dspark_runtime.backends.device_shapes import PassRanges
from dspark_runtime.backends.ort_device import OrtContext, OrtPlan
from dspark_runtime.bundle import BundleFiles, GraphEntry

_ALIGNMENT = 256


class HostCuda:
    """See :class:`dspark_runtime.backends.cuda.Cuda`. ``calls`` counts launches of graphs and waits."""

    def __init__(self, captures: bool = True) -> None:
        self.captures = captures
        self.allocated = self.launched = self.compacted = 0
        self._memory: dict[int, npt.NDArray[np.uint8]] = {}
        self._capturing: list[Callable[[], None]] | None = None
        self._graphs: dict[int, list[Callable[[], None]]] = {}

    def stream(self) -> int:
        return 7

    def event(self) -> int:
        return 1

    def allocate(self, size: int) -> int:
        self.allocated += 1
        raw = np.zeros(size + _ALIGNMENT, np.uint8)
        address = -(-raw.ctypes.data // _ALIGNMENT) * _ALIGNMENT
        self._memory[address] = raw
        return address

    def free(self, memory: int) -> None:
        del self._memory[memory]

    def pinned(self, size: int) -> Bytes:
        return np.zeros(size, np.uint8)

    def copy_in(self, device: int, host: Bytes, stream: int) -> None:
        self.do(lambda: ctypes.memmove(device, host.ctypes.data, host.nbytes))

    def copy_out(self, host: Bytes, device: int, stream: int) -> None:
        self.do(lambda: ctypes.memmove(host.ctypes.data, device, host.nbytes))

    def copy_rows(self, to: int, source: int, width: int, pitch: int, rows: int, stream: int) -> None:
        for row in range(rows):
            ctypes.memmove(to + row * pitch, source + row * pitch, width)

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
        count, to, sequence, capacity = map(int, numbers)
        pointers = _at(tables[0], tensors, np.uint64)
        heads, widths = _at(tables[1], tensors, np.int32), _at(tables[2], tensors, np.int32)
        rows = _at(sources, count, np.int64)
        assert columns == max(h * w for h, w in zip(heads, widths, strict=True))
        for pointer, head_count, width in zip(pointers.tolist(), heads.tolist(), widths.tolist(), strict=True):
            halves = _at(pointer, (sequence + 1) * head_count * capacity * width, np.uint16)
            own = halves.reshape(sequence + 1, head_count, capacity, width)[sequence]
            own[:, to : to + count] = own[:, rows]

    def record(self, event: int, stream: int) -> None:
        pass

    def wait(self, stream: int, event: int) -> None:
        pass

    def synchronize(self, event: int) -> None:
        assert self._capturing is None, "the host may not wait while a graph is captured"

    def begin_capture(self, stream: int) -> None:
        self._capturing = []

    def end_capture(self, stream: int) -> int:
        captured, self._capturing = self._capturing, None
        assert captured
        if not self.captures:
            return 0
        self._graphs[len(self._graphs) + 1] = captured
        return len(self._graphs)

    def launch(self, graph: int, stream: int) -> None:
        self.launched += 1
        for step in self._graphs[graph]:
            step()

    def do(self, step: Callable[[], Any]) -> None:
        """Carry out ``step``, or keep it where a graph is captured."""
        if self._capturing is None:
            step()
        else:
            self._capturing.append(step)


class HostPlan(OrtPlan):
    """A graph in ONNX Runtime on the CPU whose passes can be captured; ``profiles`` are those of its contexts."""

    def __init__(self, files: BundleFiles, graph: GraphEntry, cuda: HostCuda) -> None:
        for_all = tuple(  # what an engine is compiled from draws for every sequence
            dataclasses.replace(spec, shape=tuple("batch" if dim == "drawn" else dim for dim in spec.shape))
            for spec in graph.outputs
        )
        super().__init__(files.path(graph.file), graph.model_copy(update={"outputs": for_all}), "cpu", 0, 0)
        self._cuda = cuda
        self.profiles: list[int] = []

    def context(self, profile: int, stream: int) -> OrtContext:
        self.profiles.append(profile)
        return super().context(profile, stream)

    def enqueue(self, context: OrtContext, stream: int) -> None:
        run = super().enqueue
        self._cuda.do(lambda: run(context, stream))


def host_plan(files: BundleFiles) -> Callable[[GraphEntry, PassRanges, Any, int], HostPlan]:
    """What a device backend loads graphs with."""
    return lambda graph, ranges, cuda, stream: HostPlan(files, graph, cuda)


def _at(address: int, count: int, dtype: Any) -> npt.NDArray[Any]:
    size = count * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype)
