"""Graphs of trained drafters in ONNX Runtime on the CPU: inputs by name, caches updated in place."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dspark_runtime.arrays import AnyArray
from dspark_runtime.backends.host_features import HostFeatures
from dspark_runtime.backends.ort import HostCache, load_session, value_over
from dspark_runtime.backends.protocol import CacheMemory, EngineOptions, Features
from dspark_runtime.bundle.contract import CacheLayer, past_name, present_name
from dspark_runtime.errors import BackendError, CapacityError, IncompatibleBundle

_PARTS = ("key", "value")


class OrtGraphEngine:
    """One drafter's graph in an ONNX Runtime session.

    Args:
        path: the ONNX file; external data lies beside it.
        name: what to call it in messages.
        cache: geometry of its own cache, layer by layer.
        dtype: element type of the cache, ``float32``, ``float16`` or ``bfloat16``.
        options: threads and arithmetic.
        graph: run this serialized graph in place of the file's, with its data; for graphs with more outputs.

    Raises:
        BackendError: ONNX Runtime cannot load the graph.
        IncompatibleBundle: its cache tensors are not those the manifest describes.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        name: str,
        cache: Sequence[CacheLayer],
        dtype: str = "float32",
        options: EngineOptions | None = None,
        graph: bytes | None = None,
    ) -> None:
        self.name = name
        self.slots: int | None = None
        self.most_rows: int | None = None
        self.cache = tuple(cache)
        self.dtype = dtype
        self.session = load_session(Path(path), name, options or EngineOptions(), graph)
        past = {past_name(i, part) for i in range(len(self.cache)) for part in _PARTS}
        present = {present_name(i, part) for i in range(len(self.cache)) for part in _PARTS}
        have_in = {item.name for item in self.session.get_inputs()}
        have_out = {item.name for item in self.session.get_outputs()}
        if wrong := (past - have_in) | (present - have_out):
            raise IncompatibleBundle(f"graph {name} lacks {', '.join(sorted(wrong)[:6])}; build the bundle again")
        self.inputs = have_in - past
        self.outputs = tuple(sorted(have_out - present))

    def allocate(self, batch: int, capacity: int) -> HostCache:
        """See :class:`dspark_runtime.backends.protocol.GraphEngine`."""
        try:
            return HostCache(self.cache, self.dtype, batch, capacity)
        except MemoryError as error:
            raise CapacityError(f"no memory for a draft cache of {batch} x {capacity}; lower the batch") from error

    def open(self, memory: CacheMemory) -> OrtGraphRunner:
        """See :class:`dspark_runtime.backends.protocol.GraphEngine`."""
        if not isinstance(memory, HostCache):
            raise BackendError(f"{self.name} runs in host memory and cannot use a {type(memory).__name__}")
        return OrtGraphRunner(self, memory)


class OrtGraphRunner:
    """One IOBinding over one cache memory; the cache is bound again only where it moved."""

    def __init__(self, engine: OrtGraphEngine, memory: HostCache) -> None:
        self._engine = engine
        self._memory = memory
        self._binding = engine.session.io_binding()
        self._first, self._count = 0, memory.batch
        self._bound: tuple[int, int, int] | None = None
        self._held: list[Any] = []
        self._order: list[str] = []  # of the bound outputs

    def select(self, first: int, count: int) -> None:
        """See :class:`dspark_runtime.backends.protocol.GraphRunner`."""
        self._first, self._count = first, count

    def features(self, target: CacheMemory) -> HostFeatures:
        """See :class:`dspark_runtime.backends.protocol.GraphRunner`."""
        return HostFeatures()

    def feed(self, inputs: Mapping[str, Features]) -> None:
        """See :class:`dspark_runtime.backends.protocol.GraphRunner`."""
        self.run(inputs)

    def run(self, inputs: Mapping[str, Features]) -> dict[str, AnyArray]:
        """See :class:`dspark_runtime.backends.protocol.GraphRunner`."""
        if inputs.keys() != self._engine.inputs:
            wrong = ", ".join(sorted(inputs.keys() ^ self._engine.inputs))
            raise BackendError(f"{self._engine.name} was called with other inputs than it has (differing: {wrong})")
        if self._bound != (self._first, self._count, self._memory.version):
            self._bind_cache()
        values = {name: value_over(np.asarray(array)) for name, array in inputs.items()}
        for name, value in values.items():
            self._binding.bind_ortvalue_input(name, value)
        for name in self._engine.outputs:
            self._binding.bind_output(name, "cpu")  # a new one every time: their shapes change
        try:
            self._engine.session.run_with_iobinding(self._binding)
            bound = self._binding.get_outputs()
        except Exception as error:
            raise BackendError(f"ONNX Runtime failed in {self._engine.name}: {error}") from error
        places = {name: i for i, name in enumerate(self._order)}
        return {name: bound[places[name]].numpy() for name in self._engine.outputs}

    def _bind_cache(self) -> None:
        self._binding.clear_binding_inputs()
        self._binding.clear_binding_outputs()
        tensors = self._memory.tensors()
        chosen = slice(self._first, self._first + self._count)
        self._held, self._order = [], []
        for layer in range(len(self._engine.cache)):
            for part in _PARTS:
                array = tensors[layer, part][chosen]
                value = value_over(array, self._memory.element_type)
                self._binding.bind_ortvalue_input(past_name(layer, part), value)
                self._binding.bind_ortvalue_output(present_name(layer, part), value)
                self._held.append((value, array))
                self._order.append(present_name(layer, part))
        self._order += self._engine.outputs
        self._bound = (self._first, self._count, self._memory.version)
