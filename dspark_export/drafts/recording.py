"""Records what a trained drafter does while the runtime generates: its passes, and what the target accepted.

The bundle's own graphs run in the bundle's own loop. The drafter's graph returns its inner values as additional
outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from dspark_runtime import Bundle
from dspark_runtime.arrays import AnyArray, FloatArray
from dspark_runtime.backends.ort import HostCache
from dspark_runtime.backends.ort_graph import OrtGraphEngine
from dspark_runtime.backends.protocol import CacheMemory, Features, FeatureStore, GraphEngine, GraphRunner
from dspark_runtime.bundle.contract import OPSET, past_name
from dspark_runtime.bundle.draft_contract import BASE_LOGITS, BLOCK_HIDDEN, CORRECTED_LOGITS, CTX_FEATURES
from dspark_runtime.decoding.loop import DecodingLoop, LoopOptions
from dspark_runtime.decoding.observer import Observer
from dspark_runtime.decoding.request import make_requests
from dspark_runtime.decoding.round import Accepted, Flight
from dspark_runtime.decoding.schedule import Schedule
from dspark_runtime.decoding.sequence import Generation
from dspark_runtime.drafters.choice import DrafterChoice
from dspark_runtime.drafters.parts import DraftOptions
from dspark_runtime.errors import BackendError
from dspark_runtime.speculation.sampling import SamplingParams
from dspark_runtime.speculation.tree import TokenTree

MOST_DRAFTS = 31
INNER_PREFIXES = ("ctx_keys.", "ctx_values.")
_INNER = (CTX_FEATURES, BLOCK_HIDDEN, BASE_LOGITS, CORRECTED_LOGITS)


@dataclass(frozen=True)
class Call:
    """One pass of a drafter's graph: every input, every output, and the cache it found if that was requested."""

    graph: str
    inputs: dict[str, AnyArray]
    found: dict[str, AnyArray]
    cache: dict[str, AnyArray]


@dataclass(frozen=True)
class RecordedRound:
    """One round: what was verified after the anchor at ``position``, and the ``calls`` that drafted it.

    ``tokens``: what was emitted. ``drawn``: float32 [drafts, vocab], the distributions the drafts were drawn from, None
    for drafts that follow from the text. ``logits``: float32 [rows, vocab] of the target, if they were requested.
    """

    position: int
    calls: Sequence[Call]
    tree: TokenTree
    tokens: Sequence[int]
    drawn: FloatArray | None
    logits: FloatArray | None


class Recorder(Observer):
    """Watches a loop over one sequence, and the passes of the engines that :meth:`engine` gives to its drafter.

    ``caches``: keep the drafter's cache as every pass found it. ``logits``: keep the target's logits of every round.
    """

    def __init__(self, bundle: Bundle, caches: bool, logits: bool) -> None:
        self.rounds: list[RecordedRound] = []
        self.calls: list[Call] = []
        self.caches = caches
        self._bundle, self._logits = bundle, logits
        self._earlier = 0  # calls of the rounds before

    def engine(self, name: str, batched: bool = False) -> GraphEngine:
        """The engine of a drafter's graph, recorded."""
        return _RecordedEngine(engine_with_inner_outputs(self._bundle, name), self)

    def committed(self, accepted: Accepted, flight: Flight) -> None:
        """Keep what the target made of the round's drafts."""
        parts, count = accepted.proposal.parts, len(accepted.tree)
        self.rounds.append(
            RecordedRound(
                position=len(accepted.sequence.tokens) - len(accepted.tokens) - 1,
                calls=self.calls[self._earlier :],
                tree=accepted.tree,
                tokens=accepted.tokens,
                drawn=parts[0].draft.probs if parts else None,
                logits=flight.buffers.logits[accepted.row, :count].copy() if self._logits else None,
            )
        )
        self._earlier = len(self.calls)


def record(
    bundle: Bundle,
    prompt: Sequence[int],
    drafter: str,
    tokens: int,
    options: DraftOptions,
    *,
    params: SamplingParams | None = None,
    seed: int = 0,
    rounds: int | None = None,
    caches: bool = False,
    logits: bool = False,
) -> tuple[Recorder, Generation]:
    """Generate ``tokens`` tokens, or ``rounds`` rounds of them, with a drafter that always drafts as much as it can.

    An end-of-text token does not end the text.

    Raises:
        UsageError: the prompt does not fit.
    """
    recorder = Recorder(bundle, caches, logits)
    choice = DrafterChoice(bundle.files, bundle.schedule.costs, bundle.phrases, bundle.engine, recorder.engine)
    rows = 2 if bundle.exact else 1
    (request,) = make_requests([list(prompt)], bundle.limits, max_new_tokens=tokens, params=params, seed=seed)
    loop = DecodingLoop(
        bundle.engine("target"),
        Schedule(bundle.schedule.costs, fixed=MOST_DRAFTS, min_rows=rows),
        choice.make(drafter, False, options),
        rows=1,
        limit=len(prompt) + tokens,
        options=LoopOptions(min_rows=rows),
        observer=recorder,
    )
    sequence = loop.admit(request)
    while loop.busy and (rounds is None or len(recorder.rounds) < rounds):
        loop.step()
    loop.close()
    return recorder, sequence.generation()


def engine_with_inner_outputs(bundle: Bundle, name: str) -> OrtGraphEngine:
    """The engine of a drafter's graph whose named inner values are outputs too."""
    entry = bundle.files.graph(name, prefer=("onnxruntime-cpu",))
    path = bundle.files.path(entry.file)
    model = onnx.load(path, load_external_data=False)
    outputs = {value.name for value in model.graph.output}
    inner = {output for node in model.graph.node for output in node.output} - outputs
    typed = {value.name: value for value in model.graph.value_info}
    for value in sorted(inner):
        if value in _INNER or value.startswith(INNER_PREFIXES):
            model.graph.output.append(typed.get(value) or onnx.ValueInfoProto(name=value))
    assert any(item.version == OPSET for item in model.opset_import)
    return OrtGraphEngine(
        path,
        name=name,
        cache=entry.cache or (),
        dtype=entry.dtype,
        options=bundle.engine_options,
        graph=model.SerializeToString(),
    )


def host_tensors(memory: CacheMemory) -> dict[tuple[int, str], AnyArray]:
    """Cache tensors [batch, kv_heads, capacity, width] by layer and part; BackendError unless in host memory."""
    if not isinstance(memory, HostCache):
        raise BackendError(f"a {type(memory).__name__} cannot be looked at: only caches in host memory can")
    return memory.tensors()


class _RecordedEngine:
    """Passes everything on, see :class:`GraphEngine`."""

    def __init__(self, engine: GraphEngine, recorder: Recorder) -> None:
        self.name, self.slots, self.most_rows = engine.name, engine.slots, engine.most_rows
        self._engine, self._recorder = engine, recorder

    def allocate(self, batch: int, capacity: int) -> CacheMemory:
        return self._engine.allocate(batch, capacity)

    def open(self, memory: CacheMemory) -> GraphRunner:
        return _RecordedRunner(self.name, self._engine.open(memory), memory, self._recorder)


class _RecordedRunner:
    """Passes everything on and remembers it, see :class:`GraphRunner`."""

    def __init__(self, name: str, runner: GraphRunner, memory: CacheMemory, recorder: Recorder) -> None:
        self._name, self._runner, self._memory, self._recorder = name, runner, memory, recorder
        self._rows = slice(0, 1)

    def select(self, first: int, count: int) -> None:
        self._rows = slice(first, first + count)
        self._runner.select(first, count)

    def features(self, target: CacheMemory) -> FeatureStore:
        return self._runner.features(target)

    def feed(self, inputs: Mapping[str, Features]) -> None:
        self.run(inputs)

    def run(self, inputs: Mapping[str, Features]) -> dict[str, AnyArray]:
        cache = {}
        if self._recorder.caches:
            tensors = host_tensors(self._memory)
            cache = {past_name(*place): array[self._rows].copy() for place, array in tensors.items()}
        kept = {name: np.array(value) for name, value in inputs.items()}
        found = self._runner.run(inputs)
        self._recorder.calls.append(Call(self._name, kept, found, cache))
        return found
