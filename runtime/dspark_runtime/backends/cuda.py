"""The few CUDA calls that the TensorRT backend makes, behind a protocol that names what each one reads and writes.

Streams, events, graphs and device memory are plain integers. Everything is ordered by the stream it is enqueued on, and
by events between streams; while texts are generated the host waits in :meth:`Cuda.synchronize` and nowhere else.
"""

from __future__ import annotations

import ctypes
import threading
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from dspark_runtime.errors import BackendError, CapacityError, EngineWithoutDevice

Bytes = npt.NDArray[np.uint8]
Pieces = tuple[int, int]
"""Device memory of the first of several pieces, and bytes from one to the next."""
THREADS = 128

COMPACT_NAME = "dspark_compact"
COMPACT_SOURCE = r"""
// Moves rows of one sequence together in all cache tensors. sources rise and sources[j] >= to + j, so a thread that
// moves its column of one head in order never overwrites a row it has yet to read.
extern "C" __global__ void dspark_compact(const unsigned long long* tensors, const int* heads, const int* widths,
                                          const long long* sources, int count, int to, int sequence, int capacity) {
  const int tensor = blockIdx.y;
  const int column = blockIdx.x * blockDim.x + threadIdx.x;
  if (column >= heads[tensor] * widths[tensor]) return;
  const long long width = widths[tensor];
  unsigned short* base = reinterpret_cast<unsigned short*>(tensors[tensor]) +
                         ((long long)sequence * heads[tensor] + column / width) * capacity * width + column % width;
  for (int j = 0; j < count; ++j) base[(to + j) * width] = base[sources[j] * width];
}
"""


class Cuda(Protocol):
    """CUDA as the backend needs it. Sizes are bytes; every failure is a BackendError."""

    def stream(self, lane: str) -> int:
        """A new stream that does not wait for the default stream; ``lane`` says what it is for."""

    def event(self, timed: bool = False) -> int:
        """A new event; only between ``timed`` ones is time measured."""

    def allocate(self, size: int) -> int:
        """Device memory, aligned to 256, zero-filled; CapacityError if there is not enough."""

    def free(self, memory: int) -> None:
        """Give memory back once nothing enqueued uses it."""

    def pinned(self, size: int) -> Bytes:
        """Page-locked host memory, zero-filled; it lives as long as this object."""

    def copy_in(self, device: int, host: Bytes, stream: int) -> None:
        """Copy all of ``host`` to device memory."""

    def copy_out(self, host: Bytes, device: int, stream: int) -> None:
        """Copy from device memory to all of ``host``."""

    def copy_rows(self, to: Pieces, source: Pieces, width: int, rows: int, stream: int) -> None:
        """Copy ``rows`` pieces of ``width`` bytes on the device."""

    def compact(
        self,
        tables: tuple[int, int, int],
        tensors: int,
        columns: int,
        sources: int,
        numbers: npt.NDArray[np.int32],
        stream: int,
    ) -> None:
        """Run :data:`COMPACT_SOURCE` over ``tensors`` tensors of at most ``columns`` columns.

        ``tables``: device memory of pointers, heads and widths; ``sources``: of the rows; ``numbers``: count, to,
        sequence, capacity.
        """

    def record(self, event: int, stream: int) -> None:
        """The event happens when everything enqueued on ``stream`` so far is done."""

    def wait(self, stream: int, event: int) -> None:
        """What is enqueued on ``stream`` from now on waits for the event."""

    def synchronize(self, event: int) -> None:
        """The host waits for the event."""

    def elapsed(self, since: int, until: int) -> float:
        """Milliseconds between two timed events that have happened."""

    def begin_capture(self, stream: int) -> None:
        """What is enqueued on ``stream`` from now on becomes a graph instead of running."""

    def end_capture(self, stream: int) -> int:
        """The captured graph, ready to be launched; 0 if nothing could be captured."""

    def launch(self, graph: int, stream: int) -> None:
        """Run a captured graph."""


class CudaBindings:
    """:class:`Cuda` through NVIDIA's ``cuda-bindings``, on device ``number``.

    Raises:
        BackendError: the package is not installed.
        EngineWithoutDevice: there is no such GPU, or its driver is too old.
    """

    def __init__(self, number: int = 0) -> None:
        if find_spec("cuda") is None or find_spec("cuda.bindings") is None:
            raise BackendError(
                "engines run through cuda-bindings, which is not installed; run `pip install cuda-core[cu13]`"
            )
        self._cuda: Any = import_module("cuda.bindings.runtime")
        self._pinned: list[Any] = []
        self._kernel: Any = None
        self._number, self._thread = number, threading.local()
        self._choose()
        self._copy = self._cuda.cudaMemcpyKind

    def _choose(self) -> None:
        """Every thread chooses the GPU for itself, once."""
        if getattr(self._thread, "chosen", False):
            return
        code, *_ = self._cuda.cudaSetDevice(self._number)
        if int(code):
            raise EngineWithoutDevice(f"GPU {self._number} cannot be used ({code.name}); see `dspark-export doctor`")
        self._thread.chosen = True

    def _call(self, name: str, *arguments: Any) -> Any:
        self._choose()
        code, *results = getattr(self._cuda, name)(*arguments)
        if int(code):
            text = self._cuda.cudaGetErrorString(code)[1]
            message = f"{name} failed: {text.decode() if isinstance(text, bytes) else text}"
            if code == self._cuda.cudaError_t.cudaErrorMemoryAllocation:
                raise CapacityError(f"the GPU has no memory left ({message}); lower the batch")
            raise BackendError(f"{message}; the engine is not usable any more, open the bundle again")
        return results[0] if results else None

    def stream(self, lane: str) -> int:
        """See :class:`Cuda`."""
        return int(self._call("cudaStreamCreateWithFlags", self._cuda.cudaStreamNonBlocking))

    def event(self, timed: bool = False) -> int:
        """See :class:`Cuda`."""
        flags = self._cuda.cudaEventDefault if timed else self._cuda.cudaEventDisableTiming
        return int(self._call("cudaEventCreateWithFlags", flags))

    def allocate(self, size: int) -> int:
        """See :class:`Cuda`."""
        memory = int(self._call("cudaMalloc", max(size, 1)))
        self._call("cudaMemset", memory, 0, max(size, 1))
        self._call("cudaStreamSynchronize", 0)  # the other streams do not wait for the default one, which fills it
        return memory

    def free(self, memory: int) -> None:
        """See :class:`Cuda`."""
        self._call("cudaFree", memory)

    def pinned(self, size: int) -> Bytes:
        """See :class:`Cuda`."""
        address = int(self._call("cudaHostAlloc", max(size, 1), self._cuda.cudaHostAllocDefault))
        block = (ctypes.c_uint8 * size).from_address(address)
        self._pinned.append(block)
        array: Bytes = np.ctypeslib.as_array(block)
        array.fill(0)
        return array

    def copy_in(self, device: int, host: Bytes, stream: int) -> None:
        """See :class:`Cuda`."""
        kind = self._copy.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", device, host.ctypes.data, host.nbytes, kind, stream)

    def copy_out(self, host: Bytes, device: int, stream: int) -> None:
        """See :class:`Cuda`."""
        kind = self._copy.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", host.ctypes.data, device, host.nbytes, kind, stream)

    def copy_rows(self, to: Pieces, source: Pieces, width: int, rows: int, stream: int) -> None:
        """See :class:`Cuda`."""
        kind = self._copy.cudaMemcpyDeviceToDevice
        self._call("cudaMemcpy2DAsync", *to, *source, width, rows, kind, stream)

    def compact(
        self,
        tables: tuple[int, int, int],
        tensors: int,
        columns: int,
        sources: int,
        numbers: npt.NDArray[np.int32],
        stream: int,
    ) -> None:
        """See :class:`Cuda`."""
        driver: Any = import_module("cuda.bindings.driver")
        self._choose()
        if self._kernel is None:
            self._kernel = _compiled_kernel(driver)
        pointers = (*tables, sources)
        values = (*pointers, *(int(number) for number in numbers))
        types = (*(ctypes.c_void_p for _ in pointers), *(ctypes.c_int for _ in numbers))
        grid = -(-columns // THREADS), tensors, 1
        (code,) = driver.cuLaunchKernel(self._kernel, *grid, THREADS, 1, 1, 0, stream, (values, types), 0)
        if int(code):
            raise BackendError(f"the kernel that compacts the cache failed with {code.name}; open the bundle again")

    def record(self, event: int, stream: int) -> None:
        """See :class:`Cuda`."""
        self._call("cudaEventRecord", event, stream)

    def wait(self, stream: int, event: int) -> None:
        """See :class:`Cuda`."""
        self._call("cudaStreamWaitEvent", stream, event, 0)

    def synchronize(self, event: int) -> None:
        """See :class:`Cuda`."""
        self._call("cudaEventSynchronize", event)

    def elapsed(self, since: int, until: int) -> float:
        """See :class:`Cuda`."""
        return float(self._call("cudaEventElapsedTime", since, until))

    def begin_capture(self, stream: int) -> None:
        """See :class:`Cuda`."""
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", stream, mode)

    def end_capture(self, stream: int) -> int:
        """See :class:`Cuda`."""
        code, graph = self._cuda.cudaStreamEndCapture(stream)
        if int(code):
            return 0
        ready = int(self._call("cudaGraphInstantiate", graph, 0))
        self._call("cudaGraphDestroy", graph)
        return ready

    def launch(self, graph: int, stream: int) -> None:
        """See :class:`Cuda`."""
        self._call("cudaGraphLaunch", graph, stream)


def _compiled_kernel(driver: Any) -> Any:
    """:data:`COMPACT_SOURCE` compiled by NVRTC for the current GPU."""
    nvrtc: Any = import_module("cuda.bindings.nvrtc")
    runtime: Any = import_module("cuda.bindings.runtime")

    def ask(result: Any) -> Any:
        code, *values = result
        if int(code):
            raise BackendError(f"the kernel that compacts the cache cannot be made ({code.name}); update the driver")
        return values[0] if values else None

    device = ask(runtime.cudaGetDevice())
    kinds = runtime.cudaDeviceAttr
    major, minor = (
        ask(runtime.cudaDeviceGetAttribute(kind, device))
        for kind in (kinds.cudaDevAttrComputeCapabilityMajor, kinds.cudaDevAttrComputeCapabilityMinor)
    )
    program = ask(nvrtc.nvrtcCreateProgram(COMPACT_SOURCE.encode(), b"compact.cu", 0, [], []))
    ask(nvrtc.nvrtcCompileProgram(program, 1, [f"--gpu-architecture=sm_{major}{minor}".encode()]))
    binary = b" " * ask(nvrtc.nvrtcGetCUBINSize(program))
    ask(nvrtc.nvrtcGetCUBIN(program, binary))
    return ask(driver.cuModuleGetFunction(ask(driver.cuModuleLoadData(binary)), COMPACT_NAME.encode()))
