"""Graphs of trained drafters in TensorRT: inputs by name, caches updated in place on the GPU.

Not yet run on a GPU, see docs/engines.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from dspark_runtime.arrays import AnyArray
from dspark_runtime.backends.cuda import Bytes, Cuda
from dspark_runtime.backends.device import PARTS, Plan, device_cache
from dspark_runtime.backends.device_cache import CachePool, DeviceCache, LentCache
from dspark_runtime.backends.device_features import DeviceFeatures, TakenRows, takes_resident
from dspark_runtime.backends.device_layout import to_float32
from dspark_runtime.backends.device_shapes import PassRanges, largest_sizes, profile_for
from dspark_runtime.backends.host_features import HostFeatures
from dspark_runtime.backends.protocol import CacheMemory, Features, FeatureStore
from dspark_runtime.bundle.contract import TensorSpec, past_name, present_name
from dspark_runtime.bundle.draft_contract import TARGET_FEATURES, TEMPERATURE
from dspark_runtime.bundle.files import BundleFiles
from dspark_runtime.bundle.manifest import GraphEntry
from dspark_runtime.errors import BackendError

_DRAWN = "drawn"
_ALIGNMENT = 256
_SIZES = {"int64": 8, "bool": 1, "float32": 4, "float16": 2, "bfloat16": 2}


class DeviceGraphEngine:
    """The engine of one drafter's graph; arguments and errors as for the decoder's.

    Half-precision inputs are taken as float32 and rounded, outputs are widened, so that a drafter need not know what
    its graph computes in.
    """

    def __init__(
        self,
        files: BundleFiles,
        graph: GraphEntry,
        entry: PassRanges,
        cuda: Cuda,
        plan: Plan,
        *,
        overlap: bool = True,
    ) -> None:
        self.name, self.entry, self.cuda = graph.name, entry, cuda
        self.cache = graph.cache or ()
        self.plan = plan
        most = largest_sizes(entry)
        self.slots: int | None = entry.capacity
        self.most_rows: int | None = min(most[name] for name in ("features", "tokens") if name in most)
        self._pool = CachePool(cuda, self.cache, entry, plan.stream, "draft", overlap)
        self.plan.require_tensors({s.name for s in graph.inputs}, {s.name for s in graph.outputs})
        caches = {name(i, part) for i in range(len(self.cache)) for part in PARTS for name in (past_name, present_name)}
        self.inputs = tuple(spec for spec in graph.inputs if spec.name not in caches)
        self.outputs = tuple(spec for spec in graph.outputs if spec.name not in caches)

    def allocate(self, batch: int, capacity: int) -> LentCache:
        """See :class:`dspark_runtime.backends.protocol.GraphEngine`; always of the engine's own capacity."""
        profile_for(self.entry, {"batch": batch})
        return self._pool.lend(batch, capacity)

    def open(self, memory: CacheMemory) -> DeviceGraphRunner:
        """See :class:`dspark_runtime.backends.protocol.GraphEngine`."""
        cache = device_cache(self.name, self.entry, memory)
        runner = cache.runner(self.name, lambda: DeviceGraphRunner(self, cache))
        runner.select(0, memory.batch)
        return runner


class DeviceGraphRunner:
    """One execution context per profile over one cache memory, with page-locked memory for inputs and outputs."""

    def __init__(self, engine: DeviceGraphEngine, memory: DeviceCache) -> None:
        self._engine, self._memory, self._cuda = engine, memory, engine.cuda
        self._first, self._count = 0, memory.batch
        self._contexts: dict[int, Any] = {}
        self._read, self._ran, self._copied = (self._cuda.event() for _ in range(3))
        self._feeding = False  # the page-locked inputs may not be read yet
        self._features: DeviceFeatures | None = None
        most = largest_sizes(engine.entry)
        self._places, end = {}, 0
        for spec in (*engine.inputs, *engine.outputs):
            self._places[spec.name] = end
            end += -(-_bytes(spec, _dims(spec, most)) // _ALIGNMENT) * _ALIGNMENT
        self._host: Bytes = self._cuda.pinned(end)
        self._device = self._cuda.allocate(end)

    def select(self, first: int, count: int) -> None:
        """See :class:`dspark_runtime.backends.protocol.GraphRunner`."""
        self._first, self._count = first, count

    def features(self, target: CacheMemory) -> FeatureStore:
        """See :class:`~dspark_runtime.backends.protocol.GraphRunner`; on the GPU if the target's are."""
        spec = next((spec for spec in self._engine.inputs if spec.name == TARGET_FEATURES), None)
        if spec is None or not takes_resident(self._memory, target, spec):
            return HostFeatures()
        if self._features is None:
            self._features = DeviceFeatures(self._memory, spec)
        self._features.clear()
        return self._features

    def feed(self, inputs: Mapping[str, Features]) -> None:
        """See :class:`dspark_runtime.backends.protocol.GraphRunner`; nothing is copied out and nothing waits."""
        self._start(inputs, self._measured(inputs))
        if not self._memory.overlap:
            self._cuda.synchronize(self._ran)

    def run(self, inputs: Mapping[str, Features]) -> dict[str, AnyArray]:
        """See :class:`dspark_runtime.backends.protocol.GraphRunner`; one wait of the host, at the end."""
        sizes, cuda, stream = self._measured(inputs), self._cuda, self._memory.copies
        mark = self._start(inputs, sizes)
        if self._memory.overlap:
            cuda.wait(stream, self._ran)
        for spec in self._engine.outputs:
            cuda.copy_out(self._part(spec, _dims(spec, sizes)), self._device + self._places[spec.name], stream)
        cuda.record(self._copied, stream)
        cuda.synchronize(self._copied)
        self._memory.reached(mark)
        self._feeding = False
        return {spec.name: self._result(spec, sizes, inputs) for spec in self._engine.outputs}

    def _start(self, inputs: Mapping[str, Features], sizes: dict[str, int]) -> int:
        """Enqueue a pass; the point after it on the cache's stream."""
        engine, memory, cuda = self._engine, self._memory, self._cuda
        if self._feeding:
            cuda.synchronize(self._read)
        profile = profile_for(engine.entry, sizes)
        with memory.lock:
            if profile not in self._contexts:
                self._contexts[profile] = engine.plan.context(profile, memory.stream)
            context = self._contexts[profile]
            for spec in engine.inputs:
                dims, place = _dims(spec, sizes), self._device + self._places[spec.name]
                self._fill(spec, dims, inputs[spec.name])
                context.set_input_shape(spec.name, dims)
                context.set_tensor_address(spec.name, place)
            cuda.record(self._read, memory.stream)
            self._feeding = True
            self._bind_cache(context, sizes["batch"])
            for spec in engine.outputs:
                context.set_tensor_address(spec.name, self._device + self._places[spec.name])
            engine.plan.enqueue(context, memory.stream)
            cuda.record(self._ran, memory.stream)
            return memory.mark()

    def _fill(self, spec: TensorSpec, dims: tuple[int, ...], given: Features) -> None:
        place, stream = self._device + self._places[spec.name], self._memory.stream
        if isinstance(given, TakenRows):
            given.write(self._cuda, place, stream)
            return
        part = self._part(spec, dims)
        part[:] = _stored(np.asarray(given), spec.dtype).reshape(-1).view(np.uint8)
        self._cuda.copy_in(place, part, stream)

    def _measured(self, inputs: Mapping[str, Features]) -> dict[str, int]:
        """Size of every symbolic dimension of the call; BackendError if the inputs do not fit the graph."""
        names = {spec.name for spec in self._engine.inputs}
        if inputs.keys() != names:
            wrong = ", ".join(sorted(inputs.keys() ^ names))
            raise BackendError(f"{self._engine.name} was called with other inputs than it has (differing: {wrong})")
        sizes: dict[str, int] = {}
        for spec in self._engine.inputs:
            shape = inputs[spec.name].shape
            for dim, size in zip(spec.shape, shape, strict=len(spec.shape) == len(shape)):
                if isinstance(dim, str) and sizes.setdefault(dim, size) == size:
                    continue
                if dim != size:
                    raise BackendError(f"input {spec.name} of {self._engine.name} has shape {shape}, not {spec.shape}")
        return sizes

    def _bind_cache(self, context: Any, batch: int) -> None:
        for layer, geometry in enumerate(self._engine.cache):
            for part, width in zip(PARTS, (geometry.key_dim, geometry.value_dim), strict=True):
                address = self._memory.tensor(layer, part, self._first)
                dims = (batch, geometry.kv_heads, self._memory.capacity, width)
                context.set_input_shape(past_name(layer, part), dims)
                context.set_tensor_address(past_name(layer, part), address)
                context.set_tensor_address(present_name(layer, part), address)

    def _part(self, spec: TensorSpec, dims: tuple[int, ...]) -> Bytes:
        start = self._places[spec.name]
        return self._host[start : start + _bytes(spec, dims)]

    def _result(self, spec: TensorSpec, sizes: dict[str, int], inputs: Mapping[str, Features]) -> AnyArray:
        dims = _dims(spec, sizes)
        part = self._part(spec, dims)
        if spec.dtype in ("float16", "bfloat16"):
            return to_float32(part.view(np.uint16), spec.dtype).reshape(dims)
        found: AnyArray = part.view(spec.dtype).reshape(dims)
        if spec.shape[0] == _DRAWN:  # the engine draws for all sequences, greedy ones too
            found = found[np.asarray(inputs[TEMPERATURE]) > 0]
        return found.copy()


def _dims(spec: TensorSpec, sizes: dict[str, int]) -> tuple[int, ...]:
    return tuple(dim if isinstance(dim, int) else sizes["batch" if dim == _DRAWN else dim] for dim in spec.shape)


def _bytes(spec: TensorSpec, dims: tuple[int, ...]) -> int:
    return int(np.prod(dims)) * _SIZES[spec.dtype]


def _stored(array: AnyArray, dtype: str) -> npt.NDArray[Any]:
    """``array`` as the engine wants it; numpy has no bfloat16, so float32 is rounded to its upper half."""
    if dtype != "bfloat16":
        return np.ascontiguousarray(array, dtype)
    if array.dtype == np.uint16:
        return np.ascontiguousarray(array)
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
