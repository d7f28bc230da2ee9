"""ONNX Runtime on the CPU: buffers bound once, caches updated in place, several graphs over one cache memory."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dspark_runtime.backends.ort_kernels import LIBRARY_VARIABLE, NO_LIBRARY, kernel_library
from dspark_runtime.backends.protocol import CacheMemory, EngineOptions, ResidentTaps, StepBuffers, TreeCheck
from dspark_runtime.bundle.contract import (
    ATTENTION_MASK,
    HIDDEN_TAPS,
    INPUT_IDS,
    LOGIT_ROWS,
    LOGITS,
    POSITION_IDS,
    WRITE_INDICES,
    CacheLayer,
    past_name,
    present_name,
)
from dspark_runtime.errors import BackendError, CapacityError, IncompatibleBundle
from dspark_runtime.processors import default_threads

try:
    import onnxruntime as ort
except ImportError as error:  # pragma: no cover - depends on the installation
    raise BackendError("onnxruntime is not installed; run `pip install dspark-runtime[cpu]`") from error

# numpy has no bfloat16: such caches live in uint16 memory and are handed over with their ONNX element type.
_STORAGE: dict[str, tuple[Any, int]] = {
    "float32": (np.float32, 1),
    "float16": (np.float16, 10),
    "bfloat16": (np.uint16, 16),
}
_ALIGNMENT = 64
_MASKS_AHEAD = 31
_MOST_BINDINGS = 32  # ranges of rows whose bindings are kept


def _zeros(shape: tuple[int, ...], dtype: Any) -> npt.NDArray[Any]:
    """Zero-filled array on a cache-line boundary; pages are only committed once touched."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.zeros(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    aligned: npt.NDArray[Any] = raw[start : start + size].view(dtype).reshape(shape)
    return aligned


def value_over(array: npt.NDArray[Any], element_type: int | None = None) -> Any:
    """OrtValue over the memory of ``array``; the caller keeps the array alive for types numpy does not have."""
    if element_type == 16:
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, element_type)
    return ort.OrtValue.ortvalue_from_numpy(array)


class HostCache:
    """Cache memory in host RAM. Layers of equal geometry share one block, so compaction is one copy per block."""

    def __init__(self, layers: Sequence[CacheLayer], dtype: str, batch: int, capacity: int) -> None:
        self.batch = batch
        self.capacity = capacity
        self.element_type = _STORAGE[dtype][1]
        self.version = 0  # grows whenever arrays move, so that runners know when to bind again
        self._dtype = _STORAGE[dtype][0]
        members: dict[tuple[int, int], list[tuple[int, str]]] = {}
        for i, layer in enumerate(layers):
            for part, width in (("key", layer.key_dim), ("value", layer.value_dim)):
                members.setdefault((layer.kv_heads, width), []).append((i, part))
        self._members = members
        self._blocks = self._new_blocks(capacity)

    def _new_blocks(self, capacity: int) -> list[npt.NDArray[Any]]:
        return [
            _zeros((len(entries), self.batch, heads, capacity, width), self._dtype)
            for (heads, width), entries in self._members.items()
        ]

    def tensors(self) -> dict[tuple[int, str], npt.NDArray[Any]]:
        """View [batch, kv_heads, capacity, width] of every (layer, part)."""
        return {
            entry: block[i]
            for block, entries in zip(self._blocks, self._members.values(), strict=True)
            for i, entry in enumerate(entries)
        }

    def resize(self, capacity: int, keep: int) -> None:
        """See :class:`CacheMemory`."""
        blocks = self._new_blocks(capacity)
        for old, new in zip(self._blocks, blocks, strict=True):
            new[:, :, :, :keep] = old[:, :, :, :keep]
        self._blocks = blocks
        self.capacity = capacity
        self.version += 1

    def gather(self, sequence: int, sources: Sequence[int], to: int) -> None:
        """See :class:`CacheMemory`."""
        index = np.asarray(sources)
        for block in self._blocks:
            part = block[:, sequence]
            part[:, :, to : to + len(index)] = part[:, :, index]  # take() would copy all of a row among others first

    def move(self, source: int, target: int, length: int) -> None:
        """See :class:`CacheMemory`."""
        for block in self._blocks:
            block[:, target, :, :length] = block[:, source, :, :length]


class OrtEngine:
    """One graph in an ONNX Runtime session.

    Args:
        path: the ONNX file; external data lies beside it.
        name: what to call it in messages.
        cache: geometry of the cache of every layer of the *model*.
        layers: the layers this graph runs; None for all.
        dtype: element type of the caches, ``float32``, ``float16`` or ``bfloat16``.
        taps: the layers whose outputs the graph returns, as the manifest has them.
        options: threads and arithmetic.

    Raises:
        BackendError: ONNX Runtime cannot load the graph.
        IncompatibleBundle: the graph's inputs and outputs are not the contract's.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        name: str,
        cache: Sequence[CacheLayer],
        layers: Sequence[int] | None = None,
        dtype: str = "float32",
        taps: Sequence[int] = (),
        options: EngineOptions | None = None,
    ) -> None:
        self.name = name
        self.taps = tuple(taps)
        self.layers = tuple(range(len(cache))) if layers is None else tuple(layers)
        self.dtype = dtype
        self._cache = tuple(cache)
        self.session = load_session(Path(path), name, options or EngineOptions())
        outputs = {item.name: item for item in self.session.get_outputs()}
        _check_names(self.session, name, self.layers)
        self.vocab_size = int(outputs[LOGITS].shape[-1])
        self.taps_width = int(outputs[HIDDEN_TAPS].shape[-1]) if HIDDEN_TAPS in outputs else 0

    def allocate(self, batch: int, capacity: int) -> HostCache:
        """See :class:`dspark_runtime.backends.protocol.Engine`."""
        try:
            return HostCache(self._cache, self.dtype, batch, capacity)
        except MemoryError as error:
            raise CapacityError(
                f"no memory for a cache of {batch} x {capacity} tokens; lower the batch or max_new_tokens"
            ) from error

    def open(self, memory: CacheMemory) -> OrtRunner:
        """See :class:`dspark_runtime.backends.protocol.Engine`."""
        if not isinstance(memory, HostCache):
            raise BackendError(f"{self.name} runs in host memory and cannot use a {type(memory).__name__}")
        return OrtRunner(self, memory)


class OrtRunner:
    """An IOBinding for each range of rows that was selected, over one cache memory.

    A call rebinds what changed since the last one over these rows, nothing else: binding the caches of 30 layers takes
    as long as a tenth of a small model's pass, and a service goes to and fro between its prompts and its rounds.
    """

    verifies = False  # logits are in host memory anyway
    overlaps = False
    resident: ResidentTaps | None = None
    pass_ms = 0.0

    def __init__(self, engine: OrtEngine, memory: HostCache) -> None:
        self._engine = engine
        self._memory = memory
        self._session = engine.session
        self._first, self._count = 0, memory.batch
        self._bindings: OrderedDict[tuple[int, int], _Binding] = OrderedDict()
        self._bound = self._binding()
        self._shapes: dict[tuple[int, int, int], _Shape] = {}
        self._mask_memory = np.zeros(0, np.bool_)
        self._single_masks: dict[tuple[int, int], tuple[npt.NDArray[np.bool_], Any]] = {}
        self._logit_memory = np.zeros(0, np.float32)
        self.taps_wanted = True

    def select(self, first: int, count: int) -> None:
        """See :class:`dspark_runtime.backends.protocol.Runner`."""
        self._first, self._count = first, count

    def prepare(self, tokens: int, rows: int, kv_len: int) -> StepBuffers:
        """See :class:`dspark_runtime.backends.protocol.Runner`."""
        if kv_len > self._memory.capacity:
            raise CapacityError(f"a pass over {kv_len} cache slots, but only {self._memory.capacity} are allocated")
        bound = self._bound = self._binding()
        key = (self._count, tokens, rows)
        shape = self._shapes.get(key) or self._new_shape(key)
        if bound.shape is not shape:
            for name, value in shape.inputs:
                bound.io.bind_ortvalue_input(name, value)
            for name, value in shape.outputs:
                bound.io.bind_ortvalue_output(name, value)
            bound.shape = shape
        buffers = shape.buffers
        if bound.mask is None or bound.mask.shape != (self._count, 1, tokens, kv_len):
            buffers.attention_mask = self._bind_mask(bound, tokens, kv_len)
        else:
            buffers.attention_mask = bound.mask
        return buffers

    def start(self, check: TreeCheck | None = None) -> None:
        """See :class:`dspark_runtime.backends.protocol.Runner`; the pass is done when this returns."""
        if check is not None:
            raise BackendError(f"{self._engine.name} runs in host memory, where the caller verifies")
        try:
            self._session.run_with_iobinding(self._bound.io)
        except Exception as error:
            raise BackendError(f"ONNX Runtime failed in {self._engine.name}: {error}") from error

    def finish(self) -> None:
        """See :class:`dspark_runtime.backends.protocol.Runner`."""

    def run(self) -> None:
        """See :class:`dspark_runtime.backends.protocol.Runner`."""
        self.start()

    def _bind_mask(self, bound: _Binding, tokens: int, kv_len: int) -> npt.NDArray[np.bool_]:
        if tokens == 1:
            key = (self._count, kv_len)
            if key not in self._single_masks:
                # Single rows come with growing lengths. Making a value takes a few microseconds in a row of many, and
                # far longer between two passes, with cold caches.
                last = min(kv_len + _MASKS_AHEAD, self._memory.capacity)
                lengths = range(kv_len, last + 1)
                self._single_masks = {(self._count, length): self._mask_view(1, length) for length in lengths}
            mask, value = self._single_masks[key]
        else:
            mask, value = self._mask_view(tokens, kv_len)
        bound.io.bind_ortvalue_input(ATTENTION_MASK, value)
        bound.mask = mask
        return mask

    def _mask_view(self, tokens: int, kv_len: int) -> tuple[npt.NDArray[np.bool_], Any]:
        size = self._count * tokens * kv_len
        if size > self._mask_memory.size:
            self._mask_memory = _zeros((2 * size,), np.bool_)
        mask = self._mask_memory[:size].reshape(self._count, 1, tokens, kv_len)
        return mask, value_over(mask)

    def _binding(self) -> _Binding:
        """That of the selected rows, with the caches bound."""
        key = (self._first, self._count)
        bound = self._bindings.get(key)
        if bound is not None and bound.version == self._memory.version:
            self._bindings.move_to_end(key)
            return bound
        for old in [place for place, other in self._bindings.items() if other.version != self._memory.version]:
            del self._bindings[old]  # the memory it is bound to is not a cache any more
        if len(self._bindings) >= _MOST_BINDINGS:
            self._bindings.popitem(last=False)
        bound = self._bindings[key] = _Binding(self._session.io_binding(), self._memory.version)
        tensors = self._memory.tensors()
        chosen = slice(self._first, self._first + self._count)
        for layer in self._engine.layers:
            for part in ("key", "value"):
                value = value_over(tensors[layer, part][chosen], self._memory.element_type)
                bound.io.bind_ortvalue_input(past_name(layer, part), value)
                bound.io.bind_ortvalue_output(present_name(layer, part), value)
                bound.held.append((value, tensors[layer, part]))
        return bound

    def _new_shape(self, key: tuple[int, int, int]) -> _Shape:
        batch, tokens, rows = key
        size = batch * rows * self._engine.vocab_size
        if size > self._logit_memory.size:
            self._logit_memory = _zeros((size,), np.float32)
            self._shapes.clear()
        taps = None
        if self._engine.taps_width:
            taps = _zeros((batch, tokens, self._engine.taps_width), _STORAGE[self._engine.dtype][0])
        buffers = StepBuffers(
            input_ids=np.zeros((batch, tokens), np.int64),
            position_ids=np.zeros((batch, tokens), np.int64),
            attention_mask=np.zeros((batch, 1, tokens, 0), np.bool_),
            write_indices=np.zeros(batch, np.int64),
            logit_rows=np.zeros((batch, rows), np.int64),
            logits=self._logit_memory[:size].reshape(batch, rows, self._engine.vocab_size),
            taps=taps,
        )
        shape = self._shapes[key] = _Shape(buffers, _STORAGE[self._engine.dtype][1])
        return shape


@dataclass
class _Binding:
    """What is bound for one range of rows; ``held`` keeps the cache's memory alive for as long."""

    io: Any
    version: int
    shape: _Shape | None = None
    mask: npt.NDArray[np.bool_] | None = None
    held: list[Any] = field(default_factory=list)


class _Shape:
    """Buffers of one (batch, tokens, rows) and the values bound for them."""

    __slots__ = ("buffers", "inputs", "outputs")

    def __init__(self, buffers: StepBuffers, taps_type: int) -> None:
        self.buffers = buffers
        self.inputs = [
            (INPUT_IDS, value_over(buffers.input_ids)),
            (POSITION_IDS, value_over(buffers.position_ids)),
            (WRITE_INDICES, value_over(buffers.write_indices)),
            (LOGIT_ROWS, value_over(buffers.logit_rows)),
        ]
        self.outputs = [(LOGITS, value_over(buffers.logits))]
        if buffers.taps is not None:
            self.outputs.append((HIDDEN_TAPS, value_over(buffers.taps, taps_type)))


def load_session(path: Path, name: str, options: EngineOptions, graph: bytes | None = None) -> Any:
    """A session of the graph at ``path``; ``graph`` is run in its place, with the external data beside ``path``.

    The sequence kernels are registered where there is a library of them; ONNX Runtime inlines the bodies of the others.
    """
    settings = ort.SessionOptions()
    _register_kernels(settings)
    settings.log_severity_level = 3
    settings.intra_op_num_threads = options.threads or default_threads()
    settings.inter_op_num_threads = 1
    # kv_len changes with every pass: a memory plan per shape would be made once and never used again.
    settings.enable_mem_pattern = False
    settings.add_session_config_entry("session.intra_op.allow_spinning", "1" if options.spinning else "0")
    # Every session has its own threads. Those of one that has finished its pass would spin on, on the cores the next
    # one needs: passes of a target beside a drafter took twice as long.
    settings.add_session_config_entry("session.force_spinning_stop", "1")
    if options.accuracy_level:
        settings.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", str(options.accuracy_level))
    if graph is not None:
        settings.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    try:
        return ort.InferenceSession(str(path) if graph is None else graph, settings, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise BackendError(f"ONNX Runtime {ort.__version__} cannot load the graph {name} ({path}): {error}") from error


def _register_kernels(settings: Any) -> None:
    library = kernel_library()
    if library is None:
        return
    try:
        settings.register_custom_ops_library(str(library.path))
    except Exception as error:
        raise BackendError(
            f"ONNX Runtime {ort.__version__} refuses the sequence kernels {library.path}: {error}; "
            f"install a newer one, or set {LIBRARY_VARIABLE}={NO_LIBRARY}"
        ) from error


def _check_names(session: Any, name: str, layers: Sequence[int]) -> None:
    have_in = {item.name for item in session.get_inputs()}
    have_out = {item.name for item in session.get_outputs()}
    cache = [(layer, part) for layer in layers for part in ("key", "value")]
    want_in = {INPUT_IDS, POSITION_IDS, ATTENTION_MASK, WRITE_INDICES, LOGIT_ROWS, *(past_name(*c) for c in cache)}
    want_out = {LOGITS, *(present_name(*c) for c in cache)}
    wrong = (want_in ^ have_in) | (want_out ^ (have_out - {HIDDEN_TAPS}))
    if wrong:
        raise IncompatibleBundle(
            f"graph {name} does not have the inputs and outputs of this runtime's contract "
            f"(differing: {', '.join(sorted(wrong)[:6])}); build the bundle again with this version"
        )
