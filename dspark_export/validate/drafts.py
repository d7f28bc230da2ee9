"""Trained drafters: their graphs against PyTorch on recorded passes, what they get accepted against a PyTorch loop,
and whether confidences decide before the target verifies."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import torch

from dspark_export.draft_trace import engine_with_inner_outputs
from dspark_export.validate.checks import Check
from dspark_export.validate.probe import with_float_products
from dspark_export.validate.quantized import put_into
from dspark_export.validate.references import ModelRunner
from dspark_export.validate.tolerances import (
    ACCEPTANCE,
    ACCEPTANCE_QUANTIZED,
    AGAINST_MODEL,
    QUANTIZED_DRAFT,
    largest_relative,
    relative_rms,
)
from dspark_runtime import Bundle
from dspark_runtime.backends.engine import AnyArray, CacheMemory, GraphEngine, GraphRunner, StepBuffers
from dspark_runtime.bundle import DrafterEntry
from dspark_runtime.contract import ATTENTION_MASK, LOGIT_ROWS, WRITE_INDICES, GraphContract
from dspark_runtime.draft_contract import (
    ANCHOR_IDS,
    BLOCK_POSITIONS,
    CONFIDENCE_LOGITS,
    DRAFT_TOKENS,
    FEATURE_POSITIONS,
    TARGET_FEATURES,
    TEMPERATURE,
    UNIFORMS,
)
from dspark_runtime.drafter_choice import DrafterChoice, DraftOptions
from dspark_runtime.errors import UsageError
from dspark_runtime.loop import DecodingLoop, LoopOptions
from dspark_runtime.request import make_requests
from dspark_runtime.schedule import Schedule
from dspark_runtime.statistics import PositionCounts, Statistics
from dspark_runtime.tree import TokenTree

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from dspark_export.checkpoints import Checkpoint
    from dspark_export.checkpoints.drafts.draft import DraftCheckpoint

_AFTER_A_CHOICE = ("corrected_logits", "confidence_logits", "candidate_probs")
_PAST, _PRESENT = "past_key_values.", "present."
_MEANING = {
    "ctx_features": "projection and norm of the target's features",
    "ctx_keys": "keys of the context",
    "ctx_values": "values of the context",
    "block_hidden": "decoder layers of the drafter",
    "base_logits": "head",
    "corrected_logits": "Markov head",
    "draft_tokens": "choice of the drafted tokens",
    "draft_probs": "distribution of the drafted tokens",
    "confidence_logits": "confidence head",
    "candidate_tokens": "candidates",
    "candidate_probs": "probabilities of the candidates",
    "logits": "logits",
    "hidden": "decoder layer of the drafter",
}


@dataclass(frozen=True)
class Call:
    """One pass of a drafter's graph: every input, every output, and the cache it found."""

    graph: str
    inputs: dict[str, AnyArray]
    found: dict[str, AnyArray]
    cache: dict[str, AnyArray]


class _RecordingEngine:
    """Passes everything on and remembers it."""

    def __init__(self, engine: GraphEngine, calls: list[Call]) -> None:
        self.name, self._engine, self._calls = engine.name, engine, calls

    def allocate(self, batch: int, capacity: int) -> CacheMemory:
        """See :class:`GraphEngine`."""
        return self._engine.allocate(batch, capacity)

    def open(self, memory: CacheMemory) -> GraphRunner:
        """See :class:`GraphEngine`."""
        return _RecordingRunner(self.name, self._engine.open(memory), memory, self._calls)


class _RecordingRunner:
    def __init__(self, name: str, runner: GraphRunner, memory: CacheMemory, calls: list[Call]) -> None:
        self._name, self._runner, self._memory, self._calls = name, runner, memory, calls
        self._rows = slice(0, 1)

    def select(self, first: int, count: int) -> None:
        self._rows = slice(first, first + count)
        self._runner.select(first, count)

    def run(self, inputs: Mapping[str, AnyArray]) -> dict[str, AnyArray]:
        tensors = self._memory.tensors()  # type: ignore[attr-defined]
        cache = {f"{_PAST}{layer}.{part}": array[self._rows].copy() for (layer, part), array in tensors.items()}
        kept = {name: array.copy() for name, array in inputs.items()}
        found = self._runner.run(inputs)
        self._calls.append(Call(self._name, kept, found, cache))
        return found


class _RecordingLoop(DecodingLoop):
    """Remembers the trees that go to the target, by the position of their anchor."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self.verified: dict[int, TokenTree] = {}

    def _fill(self, trees: Sequence[TokenTree]) -> StepBuffers:
        self.verified[self.cache.lengths[0]] = trees[0]
        return super()._fill(trees)


def run_recorded(
    bundle: Bundle, prompt: Sequence[int], name: str, tokens: int, options: DraftOptions
) -> tuple[list[Call], dict[int, TokenTree], list[int], Statistics]:
    """A greedy text of one drafter, which always drafts as much as it can: its passes, the verified trees, the text."""
    calls: list[Call] = []

    def engine(graph: str, batched: bool) -> GraphEngine:
        return _RecordingEngine(engine_with_inner_outputs(bundle, graph), calls)

    choice = DrafterChoice(bundle.files, bundle.schedule.costs, bundle.engine, engine)
    rows = 2 if bundle.exact else 1
    loop = _RecordingLoop(
        bundle.engine("target"),
        Schedule(bundle.schedule.costs, fixed=31, min_rows=rows),
        choice.make(name, False, options),
        make_requests([list(prompt)], bundle.limits, max_new_tokens=tokens),
        options=LoopOptions(min_rows=rows),
    )
    for _ in loop:
        pass
    generation = loop.generations()[0]
    return calls, loop.verified, list(generation.tokens), generation.stats


@dataclass(frozen=True)
class Reference:
    """A drafter of the bundle in PyTorch. ``modules``: by graph, with their contracts, in float32; of a draft model
    ``model``."""

    entry: DrafterEntry
    modules: dict[str, tuple[torch.nn.Module, GraphContract]]
    model: PreTrainedModel | None = None


def references(
    bundle: Bundle, target: Checkpoint, model: PreTrainedModel, drafts: Sequence[str], allow_own_embeddings: bool = True
) -> dict[str, Reference]:
    """The drafters whose checkpoints ``drafts`` are, by their names in the bundle.

    Raises:
        UsageError: a draft that no drafter of the bundle was made from.
    """
    from dspark_export.checkpoints.drafts import recognise
    from dspark_export.checkpoints.drafts.draft import DraftCheckpoint
    from dspark_export.pair_check import require_pair

    found: dict[str, Reference] = {}
    trained = [e for e in bundle.manifest.drafters if e.kind in ("block", "eagle3", "draft_model")]
    for draft in drafts:
        checkpoint = require_pair(target, recognise(draft), allow_own_embeddings=allow_own_embeddings)
        files = checkpoint.files if isinstance(checkpoint, DraftCheckpoint) else checkpoint.source().files
        entry = next((e for e in trained if e.source is not None and dict(e.source.files) == dict(files or {})), None)
        if entry is None:
            raise UsageError(
                f"--draft {draft}: no drafter of the bundle was made from these files; it has "
                f"{', '.join(e.name for e in trained) or 'no trained drafters'}"
            )
        if isinstance(checkpoint, DraftCheckpoint):
            found[entry.name] = Reference(entry, _modules(bundle, entry, checkpoint, model))
        else:
            kind = getattr(torch, bundle.files.graph(entry.graph or entry.name).dtype)
            own = checkpoint.load_model(kind)
            torch.nn.Module.float(own)
            if bundle.manifest.precision.weights in ("int8", "int4"):
                put_into(own, ir.load(bundle.files.path(bundle.files.graph(entry.graph or entry.name).file)))
            found[entry.name] = Reference(entry, {}, own)
    return found


def _modules(
    bundle: Bundle, entry: DrafterEntry, checkpoint: DraftCheckpoint, model: PreTrainedModel
) -> dict[str, tuple[torch.nn.Module, GraphContract]]:
    from dspark_export.draft_build import embedding_scale
    from dspark_export.graphs.block_drafter import block_module
    from dspark_export.graphs.eagle3 import eagle_modules

    kind = getattr(torch, bundle.files.graph(entry.graph or entry.name).dtype)
    rounded = {name: tensor.to(kind).float() for name, tensor in checkpoint.tensors.items()}
    shared: dict[str, Any] = {
        "embedding": model.get_input_embeddings().weight.float(),
        "head": model.get_output_embeddings().weight.float(),
        "name": entry.name,
        "dtype": "float32",
        "embedding_scale": embedding_scale(model),
    }
    checkpoint = replace(checkpoint, tensors=rounded)
    if entry.eagle3 is not None:
        return {contract.name: (module, contract) for module, contract in eagle_modules(checkpoint, **shared)}
    assert entry.block is not None
    ids = None
    if entry.block.vocab_map is not None:
        ids = torch.from_numpy(np.load(bundle.files.path(entry.block.vocab_map)))
    made = block_module(
        checkpoint,
        candidates=entry.block.candidates,
        draft_vocabulary=None if checkpoint.target_ids is not None else ids,
        **shared,
    )
    return {entry.name: made}


@torch.inference_mode()
def in_pytorch(module: torch.nn.Module, contract: GraphContract, call: Call) -> dict[str, AnyArray]:
    """Outputs of ``module`` for a recorded pass, caches left out."""
    inputs = []
    for spec in contract.inputs:
        array = call.cache[spec.name] if spec.name.startswith(_PAST) else call.inputs[spec.name]
        tensor = torch.from_numpy(np.array(array))
        inputs.append(tensor.float() if tensor.is_floating_point() else tensor)
    outputs = module(*inputs)
    return {
        spec.name: tensor.numpy()
        for spec, tensor in zip(contract.outputs, outputs, strict=False)
        if not spec.name.startswith(_PRESENT)
    }


def check_drafter(bundle: Bundle, reference: Reference, prompts: Sequence[Sequence[int]], tokens: int) -> Check:
    """Every output of the drafter's graphs, inner values included, against PyTorch on the passes of real texts."""
    began = time.perf_counter()
    weights = bundle.manifest.precision.weights
    quantized = weights in ("int8", "int4")
    limit = QUANTIZED_DRAFT.get(weights, AGAINST_MODEL)
    off: dict[str, float] = {}
    passes = 0
    for prompt in prompts:
        for options in (DraftOptions(branches=1), DraftOptions(branches=3)):
            calls, *_ = run_recorded(bundle, prompt, reference.entry.name, tokens, options)
            for call in calls:
                module, contract = reference.modules[call.graph]
                passes += 1
                for name, size in _differences(in_pytorch(module, contract, call), call.found, quantized).items():
                    off[name] = max(off.get(name, 0.0), size)
    wrong = next((name for name, size in off.items() if size > limit), "")
    worst = off[wrong] if wrong else max(off.values(), default=0.0)
    part = next((text for start, text in _MEANING.items() if wrong.startswith(start)), wrong)
    return Check(
        id=f"numerics.{reference.entry.name}",
        family="numerics",
        title=f"{reference.entry.name} against PyTorch",
        status="failed" if wrong else "passed",
        measured=float(worst) if np.isfinite(worst) else None,
        limit=limit,
        unit="root mean square, relative" if quantized else "of the largest magnitude",
        where=f"{wrong}: {part}" if wrong else "",
        message=f"{wrong} is the first value that is off, so look at its {part}; "
        "`dspark-export draft-trace` writes all of them."
        if wrong
        else "",
        seconds=time.perf_counter() - began,
        data={"values": {name: size if np.isfinite(size) else None for name, size in off.items()}, "passes": passes},
    )


def _differences(wanted: dict[str, AnyArray], found: dict[str, AnyArray], quantized: bool) -> dict[str, float]:
    """In the order of computation, so that the first that is off is the cause."""
    order = list(_MEANING)
    names = [name for name in wanted if name in found and wanted[name].size]
    names.sort(key=lambda name: next((i for i, start in enumerate(order) if name.startswith(start)), len(order)))
    off = {}
    for name in names:
        a, b = found[name], wanted[name]
        if b.dtype.kind in "iu":
            if not quantized and name == DRAFT_TOKENS:
                off[name] = float(np.mean(a != b))
        elif quantized:
            a, b = np.where(np.isfinite(b), a, 0.0), np.where(np.isfinite(b), b, 0.0)
            if name in _AFTER_A_CHOICE and DRAFT_TOKENS in wanted:  # other drafts before it: another question
                same = np.cumprod(found[DRAFT_TOKENS] == wanted[DRAFT_TOKENS], 1)[:, :-1].astype(bool)
                same = np.concatenate([np.ones_like(same[:, :1]), same], 1)
                a, b = a[same], b[same]
            off[name] = relative_rms(a, b, 1.0 if name == CONFIDENCE_LOGITS else 1e-6)
        else:
            finite = np.isfinite(b)
            off[name] = largest_relative(np.where(finite, a, 0.0), np.where(finite, b, 0.0))
    return off


def check_draft_model(bundle: Bundle, reference: Reference, checker: Any) -> Check:
    """The graph of an independent draft model against that model."""
    assert reference.model is not None
    model = reference.model
    graph = bundle.files.graph(reference.entry.graph or reference.entry.name, prefer=("onnxruntime-cpu",))
    layers = range(int(model.config.get_text_config().num_hidden_layers))
    found: Check = checker.against(graph, lambda passes: ModelRunner(model, passes, layers), reference.entry.name)
    return found


def check_features(
    bundle: Bundle, reference: Reference, model: PreTrainedModel, prompts: Sequence[Sequence[int]], tokens: int
) -> Check:
    """What the runtime feeds the drafter, at every position of real texts, against PyTorch's hidden states there."""
    began = time.perf_counter()
    facts = reference.entry.block or reference.entry.eagle3
    assert facts is not None
    plain = ModelRunner(model, [], range(int(model.config.get_text_config().num_hidden_layers)), facts.taps)
    bundle = with_float_products(bundle)
    worst, where, rows = 0.0, "", 0
    for number, prompt in enumerate(prompts):
        calls, _, text, _ = run_recorded(bundle, prompt, reference.entry.name, tokens, DraftOptions(branches=1))
        wanted = plain.features([*prompt, *text])
        for call in calls:
            if TARGET_FEATURES not in call.inputs:
                continue
            start = int(call.inputs[WRITE_INDICES][0])
            if BLOCK_POSITIONS in call.inputs:
                end = int(call.inputs[BLOCK_POSITIONS][0, 0])
            else:
                end = start + int(call.inputs[LOGIT_ROWS][0, 0]) + 1
            fed = call.inputs[TARGET_FEATURES][0, : end - start]
            rows += len(fed)
            off = largest_relative(fed, wanted[start:end])
            if off > worst:
                worst, where = off, f"prompt {number}, positions {start} to {end - 1}"
    passed = worst <= AGAINST_MODEL
    return Check(
        id=f"plumbing.features.{reference.entry.name}",
        family="plumbing",
        title=f"{reference.entry.name} is fed the target's hidden states of the right rows",
        status="passed" if passed else "failed",
        measured=worst if np.isfinite(worst) else None,
        limit=AGAINST_MODEL,
        unit="of the largest magnitude",
        where="" if passed else where,
        message=""
        if passed
        else f"At {where} the drafter gets other hidden states than PyTorch has there: rows of the wrong positions, of "
        "drafts that were not accepted, or other layers. Look at DecodingLoop._show.",
        seconds=time.perf_counter() - began,
        data={"rows": rows},
    )


# Acceptance ----------------------------------------------------------------------------------------------------------


def check_acceptance(
    bundle: Bundle, reference: Reference, model: PreTrainedModel, prompts: Sequence[Sequence[int]], tokens: int
) -> Check:
    """Prefix survival by depth: the runtime against a loop in PyTorch that has no cache and shares no code with it."""
    began = time.perf_counter()
    entry = reference.entry
    assert entry.block is not None
    quantized = bundle.manifest.precision.weights in ("int8", "int4")
    limit = ACCEPTANCE_QUANTIZED if quantized else ACCEPTANCE
    mine = [PositionCounts() for _ in range(entry.block.drafts)]
    theirs = [PositionCounts() for _ in range(entry.block.drafts)]
    for prompt in prompts:
        _, _, text, stats = run_recorded(bundle, prompt, entry.name, tokens, DraftOptions(branches=1))
        for depth, counts in enumerate(stats.per_drafter[entry.name].positions if stats.per_drafter else []):
            mine[depth].verified += counts.verified
            mine[depth].accepted += counts.accepted
        for drafted, right in _reference_rounds(reference, model, list(prompt), text):
            for depth in range(drafted):
                theirs[depth].verified += 1
                theirs[depth].accepted += depth < right
    runtime, pytorch = ([round(c.survival, 4) for c in counts] for counts in (mine, theirs))
    gaps = [abs(a - b) for a, b in zip(runtime, pytorch, strict=True)]
    at = int(np.argmax(gaps))
    passed = gaps[at] <= limit
    return Check(
        id=f"plumbing.reference.{entry.name}",
        family="plumbing",
        title=f"{entry.name} is accepted as often as in PyTorch",
        status="passed" if passed else "failed",
        measured=gaps[at],
        limit=limit,
        unit="of rounds, at the worst depth",
        where="" if passed else f"draft {at + 1} of {entry.name}",
        message=""
        if passed
        else f"Draft {at + 1} survives in {runtime[at]:.1%} of rounds and in {pytorch[at]:.1%} of PyTorch's. The text "
        "is right all the same; the drafter is fed wrong features, positions or a stale cache: look at which rows the "
        "loop shows it (DecodingLoop._show) and at numerics of the same drafter.",
        seconds=time.perf_counter() - began,
        data={"runtime": list(runtime), "pytorch": list(pytorch), "rounds": mine[0].verified},
    )


@torch.inference_mode()
def _reference_rounds(
    reference: Reference, model: PreTrainedModel, prompt: list[int], text: list[int]
) -> Iterator[tuple[int, int]]:
    """Drafts and accepted drafts of every round that makes ``text``, each from all features anew."""
    entry = reference.entry
    facts = entry.block
    assert facts is not None
    (module, contract) = reference.modules[entry.name]
    ids, end = [*prompt, *text], len(prompt) + len(text)
    one = ModelRunner(model, [], range(int(model.config.get_text_config().num_hidden_layers)), facts.taps)
    features = one.features(ids)
    at = len(prompt)
    while at < end - 1:
        room = min(facts.drafts, end - 1 - at - 1)
        inputs: dict[str, AnyArray] = {
            TARGET_FEATURES: features[None, :at],
            FEATURE_POSITIONS: np.arange(at)[None],
            ANCHOR_IDS: np.array([ids[at]]),
            BLOCK_POSITIONS: np.arange(at, at + facts.block)[None],
            ATTENTION_MASK: np.ones((1, 1, facts.block, at + facts.block), np.bool_),
            WRITE_INDICES: np.zeros(1, np.int64),
            TEMPERATURE: np.zeros(1, np.float32),
            UNIFORMS: np.zeros((1, facts.drafts), np.float32),
        }
        cache = {
            spec.name: np.zeros(
                [1 if d == "batch" else at + facts.block if d == "capacity" else int(d) for d in spec.shape], np.float32
            )
            for spec in contract.inputs
            if spec.name.startswith(_PAST)
        }
        tokens = in_pytorch(module, contract, Call(entry.name, inputs, {}, cache))[DRAFT_TOKENS][0]
        right = 0
        while right < room and int(tokens[right]) == ids[at + 1 + right]:
            right += 1
        if room > 0:
            yield room, right
        at += right + 1


# Confidences ---------------------------------------------------------------------------------------------------------


def check_confidences(bundle: Bundle, entry: DrafterEntry, prompts: Sequence[Sequence[int]], tokens: int) -> Check:
    """Rows that went to the target although the confidence of a draft before them was below the threshold."""
    began = time.perf_counter()
    assert entry.block is not None
    scales = np.array(entry.block.confidence_temperatures or [1.0] * entry.block.drafts, np.float32)
    late, verified, dropped = 0, 0, 0
    for prompt in prompts:
        threshold = 0.5
        for _ in range(2):  # once to see which confidences there are, once with the middle one as threshold
            options = DraftOptions(threshold=threshold, branches=1)
            calls, trees, *_ = run_recorded(bundle, prompt, entry.name, tokens, options)
            given = [1 / (1 + np.exp(-c.found[CONFIDENCE_LOGITS][0] / scales)) for c in calls]
            threshold = float(np.median(np.concatenate(given))) if given else threshold
        bounds = {
            int(call.inputs[BLOCK_POSITIONS][0, 0]): _before(confidences, options.threshold)
            for call, confidences in zip(calls, given, strict=True)
        }
        for position, allowed in bounds.items():
            sent = len(trees[position]) - 1 if position in trees else 0
            late += max(0, sent - allowed)
            verified += sent
            dropped += entry.block.drafts - allowed
    return Check(
        id=f"plumbing.confidences.{entry.name}",
        family="plumbing",
        title=f"Confidences of {entry.name} decide before the target verifies",
        status="failed" if late else "passed",
        measured=float(late),
        limit=0.0,
        unit="rows verified below the threshold",
        where="the loop, between drafting and verification" if late else "",
        message=f"{late} of {verified} verified drafts stand behind one whose confidence is below the threshold: the "
        "cut comes after the pass it should save. Look at BlockDrafter and at what the schedule sends to the target."
        if late
        else "",
        seconds=time.perf_counter() - began,
        data={"verified": verified, "dropped": dropped},
    )


def _before(confidences: AnyArray, threshold: float) -> int:
    """Drafts before the first whose confidence is below the threshold."""
    below = np.flatnonzero(confidences < np.float32(threshold))
    return int(below[0]) if len(below) else len(confidences)
