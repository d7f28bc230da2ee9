"""What the runtime needs from an inference backend: engines, cache memory, and passes over fixed buffers.

An :class:`Engine` is one loaded graph. ``open`` joins it to a :class:`CacheMemory` and gives a :class:`Runner`, which
owns the buffers of a pass. The caller fills the arrays of :meth:`Runner.prepare`, calls :meth:`Runner.start` and, when
it wants the results, :meth:`Runner.finish`. A GPU backend computes in between, while the caller does something
else; a CPU backend does the work in ``start`` and copies nothing. Threads may share engines, but not
runners.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from dspark_runtime.arguments import whole
from dspark_runtime.arrays import AnyArray, BoolArray, FloatArray, IntArray, Runs
from dspark_runtime.errors import UsageError

MOST_ROWS = 64  # rows of one sequence in one pass

FLOAT_PRODUCTS, ROUNDED_ACTIVATIONS = 1, 4
"""ONNX Runtime's levels of products with quantized weights: in float32, or with activations rounded to 8 bits."""


@dataclass(frozen=True)
class EngineOptions:
    """How a backend runs.

    ``threads``: threads inside one operator (None: ``OMP_NUM_THREADS``, otherwise one per physical core). ``spinning``:
    threads wait busily between operators, faster and hotter. ``accuracy_level``: arithmetic of products with
    quantized weights (0: the graph's own, 1: float32, 4: int8), the dial between speed and logits independent of the
    number of rows. ``overlap``: on a GPU, work beside a pass that is on its way; False waits at once, for measurements.
    """

    threads: int | None = None
    spinning: bool = True
    accuracy_level: int = 0
    overlap: bool = True

    def __post_init__(self) -> None:
        if self.threads is not None:
            threads = whole("threads", self.threads, 1, 1024, "None for one per core, or a whole number")
            object.__setattr__(self, "threads", threads)
        if self.accuracy_level not in (0, 1, 2, 3, 4):
            raise UsageError(f"accuracy_level={self.accuracy_level}: give 0 (the graph's own) or 1 to 4")


@dataclass(slots=True)
class StepBuffers:
    """The arrays of one pass, filled in place by the caller; ``logits`` and ``taps`` are valid once it is finished.

    ``input_ids``, ``position_ids`` int64 [batch, tokens]; ``attention_mask`` bool [batch, 1, tokens, kv_len];
    ``write_indices`` int64 [batch]; ``logit_rows`` int64 [batch, rows]; ``logits`` float32 [batch, rows, vocab];
    ``taps`` [batch, tokens, width] where the graph has ``hidden_taps`` and they are wanted in host memory. Contents do
    not survive the next ``prepare``.
    """

    input_ids: IntArray
    position_ids: IntArray
    attention_mask: BoolArray
    write_indices: IntArray
    logit_rows: IntArray
    logits: FloatArray
    taps: AnyArray | None


@dataclass(frozen=True, slots=True)
class TreeCheck:
    """What a backend that verifies needs beside the logits; inputs of ``VerifyTree`` in docs/plugins.md.

    ``tokens`` int64 [batch, rows], row 0 the anchor; ``ancestors`` bool [batch, rows, rows], all false for rows a
    sequence does not have; ``uniforms`` float32 [batch, rows]; ``temperature``, ``top_p``, ``min_p`` float32 and
    ``top_k`` int64 [batch].
    """

    tokens: IntArray
    ancestors: BoolArray
    uniforms: FloatArray
    temperature: FloatArray
    top_k: IntArray
    top_p: FloatArray
    min_p: FloatArray


@dataclass(frozen=True, slots=True)
class TreeVerdicts:
    """``path`` and ``emitted`` int64 [batch, rows], ``accepted`` int64 [batch]; see ``VerifyTree``."""

    path: IntArray
    emitted: IntArray
    accepted: IntArray


class DeviceRows(Protocol):
    """An input whose numbers lie on the device already; only a runner of that device can read it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its dimensions."""


Features = AnyArray | DeviceRows
"""An input of a drafter's graph."""


class CacheMemory(Protocol):
    """Key and value memory of all layers: [batch, kv_heads, capacity, width] each, zero where never written."""

    @property
    def batch(self) -> int:
        """Sequences there is room for."""

    @property
    def capacity(self) -> int:
        """Slots of each sequence."""

    def resize(self, capacity: int, keep: int) -> None:
        """Change the slots of each sequence; the first ``keep`` keep their contents."""

    def gather(self, sequence: int, sources: Sequence[int], to: int) -> None:
        """Copy slots ``sources`` of one sequence, in all layers, to ``to``, ``to + 1``, ... (they may overlap)."""

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` slots of sequence ``source`` over sequence ``target``."""


class ResidentTaps(Protocol):
    """Taps of a runner's last pass, on the device that ran it; a :class:`FeatureStore` of that device reads them."""


class Runner(Protocol):
    """Passes of one engine over one cache memory, one at a time.

    ``verifies``: :meth:`start` may be given trees. ``overlaps``: it returns before the pass is done. ``resident``: the
    taps on a device, None in host memory; ``taps_wanted``: copy them to ``StepBuffers.taps``. ``pass_ms``: what the
    last finished pass took on its device, 0 where only the caller's clock can say.
    """

    verifies: bool
    overlaps: bool
    resident: ResidentTaps | None
    taps_wanted: bool
    pass_ms: float

    def select(self, first: int, count: int) -> None:
        """Run the following passes over the sequences ``first`` to ``first + count - 1``."""

    def prepare(self, tokens: int, rows: int, kv_len: int) -> StepBuffers:
        """Buffers of the next pass; ``kv_len`` must not exceed the memory's capacity."""

    def start(self, check: TreeCheck | None = None) -> None:
        """Begin the pass over the prepared buffers; raises BackendError.

        With ``check`` its trees are verified where it runs: logits stay there, ``StepBuffers.logits`` is not filled.
        """

    def finish(self) -> TreeVerdicts | None:
        """Wait for the pass that was started; verdicts if it was given trees. Raises BackendError."""

    def run(self) -> None:
        """Start and finish."""


class Engine(Protocol):
    """One loaded graph. ``layers`` are the decoder layers whose cache it reads and writes, ``taps`` those whose outputs
    it returns beside the logits, ``taps_width`` numbers per row together."""

    name: str
    layers: tuple[int, ...]
    vocab_size: int
    taps: tuple[int, ...]
    taps_width: int

    def allocate(self, batch: int, capacity: int) -> CacheMemory:
        """Cache memory for all layers of the model (not only those this engine runs)."""

    def open(self, memory: CacheMemory) -> Runner:
        """A runner over ``memory``, which may be shared with runners of other engines of the same model."""


class FeatureStore(Protocol):
    """Features of context rows that a drafter has not taken in yet, by row of its cache, where its engine reads them.

    ``resident``: it takes them from :class:`ResidentTaps` (:meth:`collect`), else from host memory (:meth:`add`).
    """

    resident: bool

    def add(self, row: int, features: AnyArray) -> None:
        """Copy features [rows, width] of new context rows."""

    def collect(self, row: int, taps: ResidentTaps, batch_row: int, rows: Sequence[int], columns: Runs) -> None:
        """The same from ``rows`` (ascending) and ``columns`` of one sequence of the target's last pass."""

    def waiting(self, row: int) -> int:
        """Rows that wait."""

    def move(self, source: int, target: int) -> None:
        """What waits for row ``source`` waits for ``target`` now, whose own is dropped."""

    def drop(self, row: int) -> None:
        """What waits for ``row`` is not wanted."""

    def take(self, first: int, counts: Sequence[int], rows: int) -> Features:
        """Input [len(counts), rows, width] of the next pass: the oldest ``counts[i]`` rows of ``first + i``.

        Rows after them are padding, finite numbers that nothing may look at. What is taken waits no longer.
        """


class GraphRunner(Protocol):
    """Passes of a graph with its own inputs over one cache memory."""

    def select(self, first: int, count: int) -> None:
        """Run the following passes over the sequences ``first`` to ``first + count - 1``."""

    def run(self, inputs: Mapping[str, Features]) -> dict[str, AnyArray]:
        """One pass: every input by name but the cache, every output by name but the cache; raises BackendError.

        The arrays are read while the call lasts; the results belong to the caller.
        """

    def feed(self, inputs: Mapping[str, Features]) -> None:
        """A pass of which only the cache is wanted: nothing waits for it."""

    def features(self, target: CacheMemory) -> FeatureStore:
        """A store for the features of a target with this cache memory."""


class GraphEngine(Protocol):
    """A loaded graph of a trained drafter: any inputs and outputs, plus its own cache.

    ``slots`` of a sequence and ``most_rows`` of context in one pass are what it was compiled for, None for any number.
    """

    name: str
    slots: int | None
    most_rows: int | None

    def allocate(self, batch: int, capacity: int) -> CacheMemory:
        """Cache memory for the layers of this graph."""

    def open(self, memory: CacheMemory) -> GraphRunner:
        """A runner over ``memory``, which may be shared with other graphs of the same drafter."""
