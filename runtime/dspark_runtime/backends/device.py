"""Decoders on the GPU behind the Engine protocol, whatever runs their passes: TensorRT, TensorRT-RTX or ONNX Runtime.

A pass is: fill page-locked arrays, one copy in, the engine, one copy out, and one wait of the host, when it wants the
results. With the plugins' kernels, trees are verified on the device, and only accepted rows and their tokens come
back. Passes go to the stream of the cache memory, copies out to another one that waits for the pass by
an event. Inputs and outputs have fixed addresses, so a pass of a shape that was seen before is a single CUDA graph
launch.

Not yet run on a GPU: the tests check the order of the calls, see docs/engines.md.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from dspark_runtime.backends.cuda import Cuda
from dspark_runtime.backends.device_cache import ELEMENT_BYTES, CachePool, DeviceCache, LentCache
from dspark_runtime.backends.device_features import DeviceTaps
from dspark_runtime.backends.device_layout import ALIGNMENT, INPUTS, layout, widened
from dspark_runtime.backends.device_shapes import PassRanges, PassShape, largest_sizes, pass_shape
from dspark_runtime.backends.device_verify import Kernels, Staging, Verifier
from dspark_runtime.backends.plugin_launches import DeviceTensor
from dspark_runtime.backends.protocol import CacheMemory, ResidentTaps, StepBuffers, TreeCheck, TreeVerdicts
from dspark_runtime.bundle.contract import (
    ATTENTION_MASK,
    HIDDEN_TAPS,
    LOGITS,
    past_name,
    present_name,
)
from dspark_runtime.bundle.files import BundleFiles
from dspark_runtime.bundle.manifest import GraphEntry
from dspark_runtime.errors import BackendError, EngineRangeExceeded

PARTS = ("key", "value")
_GRAPHS = 512  # of one runner; beyond that passes are enqueued one by one


class Plan(Protocol):
    """A loaded graph that runs passes over tensors given by address.

    ``stream``: all its passes are enqueued on this one; None: on any.
    """

    stream: int | None

    def require_tensors(self, inputs: set[str], outputs: set[str]) -> None:
        """Raise IncompatibleBundle unless the plan has exactly these."""

    def context(self, profile: int, stream: int) -> Any:
        """A new context for passes of ``profile``: ``set_input_shape`` and ``set_tensor_address`` say what of."""

    def enqueue(self, context: Any, stream: int) -> None:
        """Run a pass; BackendError if it is not taken."""


class DeviceEngine:
    """One decoder on the GPU.

    Args:
        files: the bundle.
        graph: the graph it runs.
        entry: the passes it takes.
        cuda: the GPU.
        plan: what runs them.
        replay: capture CUDA graphs.
        overlap: passes run beside the host; False: the host waits for each at once, and one stream has everything.
        kernels: what verifies on the GPU; None: logits are copied out.

    Raises:
        IncompatibleBundle: its tensors are not those of the contract.
    """

    def __init__(
        self,
        files: BundleFiles,
        graph: GraphEntry,
        entry: PassRanges,
        cuda: Cuda,
        plan: Plan,
        *,
        replay: bool = True,
        overlap: bool = True,
        kernels: Kernels | None = None,
    ) -> None:
        self.name, self.entry, self.cuda, self.replay = graph.name, entry, cuda, replay
        self.taps = tuple(graph.taps)
        self.cache = files.manifest.model.cache if graph.cache is None else graph.cache
        self.layers = tuple(range(len(self.cache))) if graph.layers is None else tuple(graph.layers)
        shapes = {spec.name: spec.shape for spec in graph.outputs}
        self.vocab_size = int(shapes[LOGITS][-1])
        self.taps_width = int(shapes[HIDDEN_TAPS][-1]) if HIDDEN_TAPS in shapes else 0
        self.plan = plan
        self.kernels = kernels
        self._pool = CachePool(cuda, self.cache, entry, plan.stream, "target", overlap)
        self.plan.require_tensors({s.name for s in graph.inputs}, {s.name for s in graph.outputs})

    @property
    def largest(self) -> dict[str, int]:
        """Largest size of every dimension over all profiles."""
        return largest_sizes(self.entry)

    def allocate(self, batch: int, capacity: int) -> LentCache:
        """See :class:`dspark_runtime.backends.protocol.Engine`; always of the engine's own capacity."""
        if batch > self.largest["batch"]:
            raise EngineRangeExceeded(
                f"{batch} sequences together, and the engine of {self.name} takes {self.largest['batch']}; lower "
                "batch_size, or compile the bundle again with a larger --batch"
            )
        return self._pool.lend(batch, capacity)

    def open(self, memory: CacheMemory) -> DeviceRunner:
        """See :class:`dspark_runtime.backends.protocol.Engine`."""
        cache = device_cache(self.name, self.entry, memory)
        runner = cache.runner(self.name, lambda: DeviceRunner(self, cache))
        runner.select(0, memory.batch)
        return runner


def device_cache(name: str, entry: PassRanges, memory: CacheMemory) -> DeviceCache:
    """``memory`` if the engine can use it; BackendError otherwise."""
    if isinstance(memory, LentCache):
        memory = memory.cache
    if not isinstance(memory, DeviceCache):
        raise BackendError(f"{name} runs on the GPU and cannot use a {type(memory).__name__}")
    if memory.capacity != entry.capacity:
        raise BackendError(
            f"the engine of {name} has {entry.capacity} cache slots, the memory it would share {memory.capacity}; "
            "compile all graphs of the bundle together"
        )
    return memory


class DeviceRunner:
    """Passes over one cache memory, through one execution context per profile and one CUDA graph per shape."""

    def __init__(self, engine: DeviceEngine, memory: DeviceCache) -> None:
        self._engine, self._memory, self._cuda = engine, memory, engine.cuda
        self._first, self._count, self._element = 0, memory.batch, ELEMENT_BYTES[engine.entry.dtype]
        most = engine.largest
        batch, tokens, rows = (most[name] for name in ("batch", "tokens", "rows"))
        self._inputs = Staging(self._cuda, layout(batch, tokens, rows, engine.entry.capacity)[1])
        self._outputs = Staging(self._cuda, 4 * batch * rows * engine.vocab_size + ALIGNMENT)
        self._taps = (
            Staging(self._cuda, self._element * batch * tokens * engine.taps_width) if engine.taps_width else None
        )
        self._verifier = None if engine.kernels is None else Verifier(self._cuda, engine.kernels, batch, rows)
        self.verifies, self.overlaps = self._verifier is not None, memory.overlap
        self.taps_wanted, self.pass_ms = False, 0.0
        self._contexts: dict[int, Any] = {}
        self._graphs: dict[_Key, tuple[int, Any]] = {}
        self._seen: set[_Key] = set()
        self._views: dict[PassShape, tuple[npt.NDArray[Any], ...]] = {}
        self._shape: PassShape | None = None
        self._buffers: StepBuffers | None = None
        self._began, self._ran = self._cuda.event(timed=True), self._cuda.event(timed=True)
        self._copied = self._cuda.event()
        self._flying: _Key | None = None
        self._mark = 0
        self._checked = 0  # rows of the trees that were given
        self._resident = (
            None
            if self._taps is None
            else DeviceTaps(self._taps.device, engine.entry.dtype, engine.taps_width, self._ran)
        )
        self.resident: ResidentTaps | None = self._resident

    def select(self, first: int, count: int) -> None:
        """See :class:`dspark_runtime.backends.protocol.Runner`."""
        self._first, self._count = first, count

    def prepare(self, tokens: int, rows: int, kv_len: int) -> StepBuffers:
        """See :class:`dspark_runtime.backends.protocol.Runner`; raises EngineRangeExceeded."""
        self.finish()  # of a pass that nobody waited for: its arrays are still read
        engine = self._engine
        shape = self._shape = pass_shape(engine.entry, self._count, tokens, rows, kv_len)
        ids, positions, write, logit_rows, mask, logits = self._views.get(shape) or self._new_views(shape)
        mask[..., kv_len:] = False
        if tokens < shape.tokens:
            ids[:, tokens:] = positions[:, tokens:] = 0
            mask[:, :, tokens:, :] = False
            mask[:, :, tokens:, 0] = True
        logit_rows[:, rows:] = 0
        self._buffers = StepBuffers(
            input_ids=ids[:, :tokens],
            position_ids=positions[:, :tokens],
            attention_mask=mask[:, :, :tokens, :kv_len],
            write_indices=write,
            logit_rows=logit_rows[:, :rows],
            logits=logits[:, :rows],
            taps=np.zeros((shape.batch, tokens, engine.taps_width), np.float32) if self._shown else None,
        )
        return self._buffers

    def start(self, check: TreeCheck | None = None) -> None:
        """See :class:`dspark_runtime.backends.protocol.Runner`: everything is enqueued, nothing waits."""
        shape, memory, cuda = self._shape, self._memory, self._cuda
        if shape is None or self._buffers is None:
            raise BackendError(f"{self._engine.name} was run before its pass was prepared")
        if check is not None:
            if self._verifier is None:
                raise BackendError(f"{self._engine.name} verifies nothing on the GPU; build plugins/ for its kernels")
            self._verifier.fill(check, shape.batch, shape.rows)
            self._checked = check.tokens.shape[1]
        key = (shape, self._first, check is not None)
        with memory.lock:
            if self._resident is not None:
                self._resident.tokens = shape.tokens
                self._resident.release(cuda, memory.stream)
            cuda.record(self._began, memory.stream)
            if key in self._graphs or (key in self._seen and len(self._graphs) < _GRAPHS and self._capture(key)):
                cuda.launch(self._graphs[key][0], memory.stream)
            else:
                if shape.replayed and self._engine.replay:
                    self._seen.add(key)
                self._enqueue(self._context(shape.profile), key)
            cuda.record(self._ran, memory.stream)
            self._mark = memory.mark()
            self._fetch(key)
        self._flying = key

    def finish(self) -> TreeVerdicts | None:
        """See :class:`dspark_runtime.backends.protocol.Runner`; the only wait of the host."""
        key, self._flying = self._flying, None
        if key is None:
            return None
        self._cuda.synchronize(self._copied)
        self._memory.reached(self._mark)
        self.pass_ms = self._cuda.elapsed(self._began, self._ran)
        taps = None if self._buffers is None else self._buffers.taps
        if taps is not None and self._taps is not None:
            taps[:] = widened(self._taps.host, self._engine.entry.dtype, key[0], taps.shape)
        return self._verifier.verdicts(self._checked) if key[2] and self._verifier is not None else None

    def run(self) -> None:
        """See :class:`dspark_runtime.backends.protocol.Runner`."""
        self.start()
        self.finish()

    @property
    def _shown(self) -> bool:
        """Whether taps are copied to the host."""
        return self.taps_wanted and self._taps is not None

    def _fetch(self, key: _Key) -> None:
        """Copy out what the host wants. Nothing overwrites it in the meantime: the host waits before it starts a
        pass."""
        shape, _, verified = key
        cuda, stream = self._cuda, self._memory.copies
        if self._memory.overlap:
            cuda.wait(stream, self._ran)
        if verified and self._verifier is not None:
            self._verifier.fetch(stream)
        else:
            wanted = 4 * shape.batch * shape.rows * self._engine.vocab_size
            cuda.copy_out(self._outputs.host[:wanted], self._outputs.device, stream)
        if self._shown and self._taps is not None:
            wanted = self._element * shape.batch * shape.tokens * self._engine.taps_width
            cuda.copy_out(self._taps.host[:wanted], self._taps.device, stream)
        cuda.record(self._copied, stream)

    def _capture(self, key: _Key) -> bool:
        """Turn the pass into a graph. It gets its own context: a context must not change under a graph.

        TensorRT finishes what a new shape needs when it is first enqueued, which must not happen while capturing. So
        the pass runs once more than it has to; it writes the same rows to the same slots.
        """
        context = self._engine.plan.context(key[0].profile, self._memory.stream)
        self._bind(context, key[0])
        self._enqueue(context, key, bound=True)
        self._cuda.begin_capture(self._memory.stream)
        try:
            self._enqueue(context, key, bound=True)
        finally:
            graph = self._cuda.end_capture(self._memory.stream)
        if not graph:  # this engine cannot be captured: enqueue it from now on
            self._seen.clear()
            self._engine.replay = False
            return False
        self._graphs[key] = graph, context
        return True

    def _enqueue(self, context: Any, key: _Key, bound: bool = False) -> None:
        shape, _, verified = key
        stream = self._memory.stream
        if not bound:
            self._bind(context, shape)
        _, size = layout(shape.batch, shape.tokens, shape.rows, shape.kv_len)
        self._cuda.copy_in(self._inputs.device, self._inputs.host[:size], stream)
        self._engine.plan.enqueue(context, stream)
        if verified and self._verifier is not None:
            logits = DeviceTensor(self._outputs.device, (shape.batch, shape.rows, self._engine.vocab_size), "float32")
            self._verifier.enqueue(logits, stream)

    def _bind(self, context: Any, shape: PassShape) -> None:
        """Addresses and shapes of everything; past and present of a cache are one address."""
        engine, memory = self._engine, self._memory
        places, _ = layout(shape.batch, shape.tokens, shape.rows, shape.kv_len)
        for name, (offset, dims) in places.items():
            context.set_input_shape(name, dims)
            context.set_tensor_address(name, self._inputs.device + offset)
        for layer in engine.layers:
            geometry = engine.cache[layer]
            for part, width in zip(PARTS, (geometry.key_dim, geometry.value_dim), strict=True):
                address = memory.tensor(layer, part, self._first)
                context.set_input_shape(
                    past_name(layer, part), (shape.batch, geometry.kv_heads, memory.capacity, width)
                )
                context.set_tensor_address(past_name(layer, part), address)
                context.set_tensor_address(present_name(layer, part), address)
        context.set_tensor_address(LOGITS, self._outputs.device)
        if self._taps is not None:
            context.set_tensor_address(HIDDEN_TAPS, self._taps.device)

    def _context(self, profile: int) -> Any:
        if profile not in self._contexts:
            self._contexts[profile] = self._engine.plan.context(profile, self._memory.stream)
        return self._contexts[profile]

    def _new_views(self, shape: PassShape) -> tuple[npt.NDArray[Any], ...]:
        """Inputs and logits of a shape in page-locked memory; kept for shapes that come again."""
        places, _ = layout(shape.batch, shape.tokens, shape.rows, shape.kv_len)
        views: list[npt.NDArray[Any]] = []
        for name in INPUTS:
            offset, dims = places[name]
            kind = np.bool_ if name == ATTENTION_MASK else np.int64
            size = int(np.prod(dims)) * np.dtype(kind).itemsize
            views.append(self._inputs.host[offset : offset + size].view(kind).reshape(dims))
        dims = shape.batch, shape.rows, self._engine.vocab_size
        views.append(self._outputs.host[: 4 * int(np.prod(dims))].view(np.float32).reshape(dims))
        if shape.replayed:
            self._views[shape] = tuple(views)
        return tuple(views)


_Key = tuple[PassShape, int, bool]  # of a pass: its shape, its first sequence, whether it is verified on the GPU
