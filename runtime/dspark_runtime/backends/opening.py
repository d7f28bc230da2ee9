"""Backends by name: what loads a bundle's graphs, on which device, and how large its passes may be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, cast, get_args

from dspark_runtime.backends.cuda import Cuda, CudaBindings
from dspark_runtime.backends.device import DeviceEngine, Plan
from dspark_runtime.backends.device_graph import DeviceGraphEngine
from dspark_runtime.backends.device_shapes import PassRanges, largest_sizes
from dspark_runtime.backends.device_verify import Kernels
from dspark_runtime.backends.ort_kernels import kernel_library, missing_operators, say_what_is_lost
from dspark_runtime.backends.plugin_files import FATBIN, plugin_file
from dspark_runtime.backends.plugin_kernels import PluginKernels
from dspark_runtime.backends.protocol import FLOAT_PRODUCTS, MOST_ROWS, Engine, EngineOptions, GraphEngine
from dspark_runtime.backends.tensorrt_check import DeviceFacts, require_device, runs_on
from dspark_runtime.backends.tensorrt_device import this_device
from dspark_runtime.backends.tensorrt_plan import LoadedPlan
from dspark_runtime.bundle.engine_entry import EngineEntry
from dspark_runtime.bundle.files import BundleFiles
from dspark_runtime.bundle.manifest import GraphEntry, Variant
from dspark_runtime.errors import EngineWithoutDevice, IncompatibleBundle, UsageError

BackendName = Literal["onnxruntime", "onnxruntime-cuda", "tensorrt", "tensorrt-rtx"]
CHUNK = 512
"""Prompt tokens of a pass."""

_CUDA_BATCH, _CUDA_LENGTH = 8, 4096  # of ONNX Runtime's CUDA provider, where the caller does not say
# Graph variants to look for, by whether several sequences share a pass; the standard graph takes any number.
_VARIANTS: dict[bool, tuple[Variant, ...]] = {False: ("onnxruntime-cpu",), True: ("onnxruntime-cpu-batch",)}
_KERNELS: Variant = "sequence-kernels"


@dataclass(frozen=True)
class BackendLimits:
    """Largest passes: ``slots`` of a sequence's cache and ``batch`` sequences (None: no limit), ``rows`` of a verify
    pass, ``chunk`` tokens of a prompt."""

    slots: int | None = None
    batch: int | None = None
    rows: int = MOST_ROWS
    chunk: int = CHUNK

    @property
    def positions(self) -> int | None:
        """Most tokens of prompt and text together: rows of a pass that are not accepted need slots too."""
        return None if self.slots is None else self.slots // 64 * 64 - MOST_ROWS


class Backend(Protocol):
    """Loads graphs of one bundle, each once.

    ``rows_are_equal``: the bits of a row of the target depend on its own sequence alone, by how its operators work.
    ``measured``: it runs where a build measures how far they do otherwise.
    """

    limits: BackendLimits
    rows_are_equal: bool
    measured: bool

    def engine(self, name: str, batched: bool) -> Engine:
        """The decoder ``name``; ``batched`` if passes hold more than one sequence."""

    def graph_engine(self, name: str, batched: bool) -> GraphEngine:
        """The trained drafter's graph ``name``."""


def host_graph(
    files: BundleFiles, name: str, batched: bool = False, options: EngineOptions | None = None
) -> GraphEntry:
    """The form of graph ``name`` that runs on this CPU: with sequence kernels, if there is a library of them.

    Operators that the library lacks run as the bodies of their functions. Without a library, ONNX Runtime's own forms;
    where float32 products are wanted and those are of integers, the standard one.
    """
    found = files.graph(name, prefer=(_KERNELS,))
    if found.variant == _KERNELS:
        say_what_is_lost(frozenset(kernel for graph in files.manifest.graphs for kernel in graph.kernels))
        if kernel_library() is not None:
            return found
    wide = (
        options is not None and options.accuracy_level == FLOAT_PRODUCTS and files.manifest.precision.integer_products
    )
    return files.graph(name, prefer=() if wide else _VARIANTS[batched])


def rows_are_equal(files: BundleFiles) -> bool:
    """Whether every node of the target that computes runs as a sequence kernel on this CPU."""
    graph = host_graph(files, "target")
    return graph.variant == _KERNELS and not graph.standard_nodes and not missing_operators(frozenset(graph.kernels))


class HostBackend:
    """ONNX Runtime on the CPU."""

    measured = True

    def __init__(self, files: BundleFiles, options: EngineOptions) -> None:
        self.limits = BackendLimits()
        self.rows_are_equal = rows_are_equal(files)
        self._files, self._options = files, options
        self._engines: dict[str, Engine] = {}
        self._graphs: dict[str, GraphEngine] = {}

    def engine(self, name: str, batched: bool) -> Engine:
        """See :class:`Backend`."""
        graph = host_graph(self._files, name, batched, self._options)
        if graph.file not in self._engines:
            # onnxruntime: only when a graph runs on it
            from dspark_runtime.backends.ort import OrtEngine

            self._engines[graph.file] = OrtEngine(
                self._files.path(graph.file),
                name=name,
                cache=self._files.manifest.model.cache,
                layers=graph.layers,
                dtype=graph.dtype,
                taps=graph.taps,
                options=self._options,
            )
        return self._engines[graph.file]

    def graph_engine(self, name: str, batched: bool) -> GraphEngine:
        """See :class:`Backend`."""
        graph = host_graph(self._files, name, batched, self._options)
        if graph.file not in self._graphs:
            # onnxruntime: only when a graph runs on it
            from dspark_runtime.backends.ort_graph import OrtGraphEngine

            self._graphs[graph.file] = OrtGraphEngine(
                self._files.path(graph.file),
                name=name,
                cache=graph.cache or (),
                dtype=graph.dtype,
                options=self._options,
            )
        return self._graphs[graph.file]


class DeviceBackend:
    """Decoders on the GPU: engines of TensorRT, or the standard graphs in ONNX Runtime's CUDA provider.

    Graphs of trained drafters run on the GPU with TensorRT, on the CPU with ONNX Runtime.

    Args:
        files: the bundle.
        name: the backend.
        options: of what runs on the CPU, and whether passes run beside the host.
        number: of the GPU.
        length: cache slots of a sequence, for ONNX Runtime; None for the model's positions, at most 4096.
        cuda: makes the GPU's interface.
        plan: loads a graph for given ranges.
        device: asks for the GPU.
        kernels: finds what verifies on the GPU; None: the host verifies.

    Raises:
        IncompatibleBundle: the bundle has no engine of the target for this backend.
    """

    measured = False

    def __init__(
        self,
        files: BundleFiles,
        name: BackendName,
        options: EngineOptions,
        number: int = 0,
        length: int | None = None,
        *,
        cuda: Callable[[int], Cuda] = CudaBindings,
        plan: Callable[[GraphEntry, PassRanges, Cuda, int], Plan] | None = None,
        device: Callable[[int], DeviceFacts | None] = this_device,
        kernels: Callable[[int], Kernels | None] | None = None,
    ) -> None:
        self.rows_are_equal = False
        self._files, self._name, self._number = files, name, number
        self._make_cuda, self._make_plan, self._device = cuda, plan, device
        self._make_kernels = kernels or found_kernels
        self._host, self._overlap = HostBackend(files, options), options.overlap
        positions = files.manifest.model.max_positions
        self._length = -(-min(length or _CUDA_LENGTH, positions) // 64) * 64 + MOST_ROWS
        self._cuda: Cuda | None = None
        self._stream = 0
        self._engines: dict[str, DeviceEngine] = {}
        self._graphs: dict[str, DeviceGraphEngine] = {}
        target = self._ranges(self._standard("target"))
        most = largest_sizes(target)
        rows, chunk = min(most["rows"], MOST_ROWS), min(most["tokens"], CHUNK)
        self.limits = BackendLimits(target.capacity, most["batch"], rows, chunk)

    def engine(self, name: str, batched: bool) -> Engine:
        """See :class:`Backend`."""
        if name not in self._engines:
            graph = self._standard(name)
            ranges = self._ranges(graph)
            cuda = self._opened(ranges)
            # ONNX Runtime waits for the device inside a pass, which cannot be captured.
            plan, replay = self._plan(graph, ranges, cuda), isinstance(ranges, EngineEntry)
            kernels = self._make_kernels(self._number) if name == "target" else None
            self._engines[name] = DeviceEngine(
                self._files, graph, ranges, cuda, plan, replay=replay, overlap=self._overlap, kernels=kernels
            )
        return self._engines[name]

    def graph_engine(self, name: str, batched: bool) -> GraphEngine:
        """See :class:`Backend`."""
        if self._name == "onnxruntime-cuda":
            return self._host.graph_engine(name, batched)
        if name not in self._graphs:
            graph = self._standard(name)
            ranges = self._ranges(graph)
            cuda = self._opened(ranges)
            plan = self._plan(graph, ranges, cuda)
            self._graphs[name] = DeviceGraphEngine(self._files, graph, ranges, cuda, plan, overlap=self._overlap)
        return self._graphs[name]

    def _standard(self, name: str) -> GraphEntry:
        return self._files.graph(name, prefer=())

    def _ranges(self, graph: GraphEntry) -> PassRanges:
        if self._name == "onnxruntime-cuda":
            # onnxruntime: only when a graph runs on it
            from dspark_runtime.backends.ort_device import ChosenRanges

            return ChosenRanges.of(graph, self._length, _CUDA_BATCH, MOST_ROWS, CHUNK)
        entries = [e for e in self._files.manifest.engines if (e.graph, e.flavour) == (graph.name, self._name)]
        if not entries:
            raise IncompatibleBundle(
                f"this bundle has no {self._name} engine of {graph.name}; run `dspark-export compile "
                f"{self._files.root} --backend {self._name}`, or leave out --backend"
            )
        device = self._device(self._number)
        return next((e for e in entries if device is not None and runs_on(e, device.capability)), entries[0])

    def _opened(self, ranges: PassRanges) -> Cuda:
        if self._cuda is None:
            device = self._device(self._number)
            if isinstance(ranges, EngineEntry):
                require_device(ranges, device)
            elif device is None:
                raise EngineWithoutDevice(
                    f"--backend {self._name} needs an NVIDIA GPU and its driver, and there is no GPU {self._number}; "
                    "leave out --backend"
                )
            self._cuda = self._make_cuda(self._number)
            self._stream = self._cuda.stream("target")
        return self._cuda

    def _plan(self, graph: GraphEntry, ranges: PassRanges, cuda: Cuda) -> Plan:
        if self._make_plan is not None:
            return self._make_plan(graph, ranges, cuda, self._stream)
        if isinstance(ranges, EngineEntry):
            return LoadedPlan(self._files, ranges, cuda, device=lambda: self._device(self._number))
        # onnxruntime: only when a graph runs on it
        from dspark_runtime.backends.ort_device import OrtPlan

        return OrtPlan(self._files.path(graph.file), graph, "cuda", self._number, self._stream)


def found_kernels(number: int) -> Kernels | None:
    """The plugins' kernels on GPU ``number``; None if ``dspark.fatbin`` was not built."""
    return None if plugin_file(FATBIN) is None else PluginKernels(number)


def open_backend(
    files: BundleFiles, name: str, options: EngineOptions, number: int = 0, length: int | None = None
) -> Backend:
    """The backend ``name`` for a bundle; ``number`` of the GPU and ``length`` of its caches are not for the CPU.

    Raises:
        UsageError: there is no such backend.
        IncompatibleBundle: the bundle has no engine for it.
    """
    if name not in get_args(BackendName):
        raise UsageError(f"backend {name!r} is unknown; choose {', '.join(get_args(BackendName))}")
    if isinstance(number, bool) or not isinstance(number, int) or number < 0:
        raise UsageError(f"device={number!r}: give the number of a GPU, from 0")
    if name == "onnxruntime":
        return HostBackend(files, options)
    return DeviceBackend(files, cast(BackendName, name), options, number, length)
