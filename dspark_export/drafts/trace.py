"""Every intermediate of the first rounds of a trained drafter, by name, for debugging a draft that is rarely right.

The bundle's own graphs run in the bundle's own loop; the drafter's graph gives its inner values as further outputs.
Arrays carry no batch dimension. Round 0 has plain names, later rounds are prefixed ``round1.``, ``round2.``, ...

Of a block drafter:

==================== =========================== ==================================================================
name                 shape                       what
==================== =========================== ==================================================================
target_features      [features, taps * hidden]   outputs of the tapped layers of rows new to the drafter
feature_positions    [features]                  their positions
ctx_features         [features, hidden]          after projection and norm
ctx_keys.{i}         [features, kv_heads, width] keys made from them in draft layer i, rotated
ctx_values.{i}       [features, kv_heads, width] values made from them
anchor_id            []                          last committed token
block_positions      [block]                     positions of the block's rows
block_hidden         [drafts, hidden]            after the last norm
base_logits          [drafts, draft vocab]       before the Markov head
corrected_logits     [drafts, draft vocab]       after it
draft_tokens         [drafts]                    ids of the target's vocabulary
draft_probs          [drafts, draft vocab]       what they were drawn from; absent where greedy
candidate_tokens     [drafts, candidates]        likeliest tokens of each slot
candidate_probs      [drafts, candidates]        their probabilities at temperature 1
beam_tokens          [nodes]                     next tokens of the likely texts, slot by slot
beam_probs           [nodes]                     their probabilities given the tokens above
beam_parents         [nodes]                     the node above, -1 for the anchor
confidence_logits    [drafts]                    of drafters with a confidence head
==================== =========================== ==================================================================

Of an EAGLE-3 drafter or a draft model: ``extend.<name>`` and ``step<k>.<name>`` for every input and output of the
passes of the round. Of every round: ``tree_tokens`` and ``tree_parents`` [rows], what was verified; ``target_logits``
[rows, vocab]; ``accepted`` [], drafts accepted; ``emitted`` [accepted + 1]. Verified by rejection sampling, also
``accept_probs`` [drafts], the chance min(1, p/q) of each draft, and ``residuals`` [drafts, vocab], the distribution
that follows its rejection. Once: ``prompt_ids``, ``first_token``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from dspark_runtime import Bundle
from dspark_runtime.backends.ort_graph import OrtGraphEngine
from dspark_runtime.backends.protocol import (
    AnyArray,
    CacheMemory,
    Features,
    FeatureStore,
    FloatArray,
    GraphEngine,
    GraphRunner,
    StepBuffers,
)
from dspark_runtime.bundle.contract import ATTENTION_MASK, OPSET, WRITE_INDICES
from dspark_runtime.bundle.draft_contract import (
    ANCHOR_IDS,
    BASE_LOGITS,
    BLOCK_HIDDEN,
    CORRECTED_LOGITS,
    CTX_FEATURES,
    TEMPERATURE,
    UNIFORMS,
)
from dspark_runtime.decoding.loop import DecodingLoop, LoopOptions
from dspark_runtime.decoding.request import make_requests
from dspark_runtime.decoding.round import Accepted
from dspark_runtime.decoding.schedule import Schedule
from dspark_runtime.decoding.sequence import SequenceState
from dspark_runtime.drafters.choice import DrafterChoice
from dspark_runtime.drafters.parts import DraftOptions
from dspark_runtime.drafters.proposal import Proposal
from dspark_runtime.errors import UsageError
from dspark_runtime.speculation.sampling import SamplingParams, distribution
from dspark_runtime.speculation.tree import TokenTree
from dspark_runtime.speculation.verify import MIN_RESIDUAL, Verdict

_INNER = (CTX_FEATURES, BLOCK_HIDDEN, BASE_LOGITS, CORRECTED_LOGITS)
_INNER_PREFIXES = ("ctx_keys.", "ctx_values.")
_PER_CONTEXT_ROW = (CTX_FEATURES, *_INNER_PREFIXES, "target_features", "feature_positions")
_MOST_DRAFTS = 31


def trace_draft(
    bundle: Bundle,
    prompt: Sequence[int],
    drafter: str,
    *,
    rounds: int = 1,
    options: DraftOptions | None = None,
    params: SamplingParams | None = None,
    seed: int = 0,
) -> dict[str, AnyArray]:
    """The named arrays of the first ``rounds`` rounds of ``drafter``; see the module's text.

    Raises:
        UsageError: the bundle has no trained drafter of that name, or the prompt does not fit.
    """
    trained = [entry.name for entry in bundle.manifest.drafters if entry.trained]
    if drafter not in trained:
        raise UsageError(f"{drafter!r} is no trained drafter of this bundle; it has {', '.join(trained) or 'none'}")
    calls: list[tuple[str, dict[str, AnyArray]]] = []
    choice = DrafterChoice(
        bundle.files,
        bundle.schedule.costs,
        bundle.engine,
        lambda name, batched: _RecordingEngine(engine_with_inner_outputs(bundle, name), calls),
    )
    requests = make_requests(
        [list(prompt)],
        bundle.limits,
        max_new_tokens=min(rounds * (_MOST_DRAFTS + 1) + 1, bundle.limits.positions - len(prompt)),
        params=params or SamplingParams(),
        seed=seed,
        stop=(),
        eos=(),
    )
    loop = _RecordingLoop(
        bundle.engine("target"),
        Schedule(bundle.schedule.costs, fixed=_MOST_DRAFTS, min_rows=2 if bundle.exact else 1),
        choice.make(drafter, False, options or DraftOptions()),
        requests,
        options=LoopOptions(min_rows=2 if bundle.exact else 1),
    )
    chunks = iter(loop)
    first = next(chunks)
    found: dict[str, AnyArray] = {"prompt_ids": np.array(prompt), "first_token": np.array(first.tokens[0])}
    for number in range(rounds):
        calls.clear()
        if next(chunks, None) is None:
            break
        prefix = f"round{number}." if number else ""
        arrays = _of_block(calls) if _is_block(bundle, drafter) else _of_passes(calls)
        found.update({prefix + name: array for name, array in {**arrays, **loop.verified}.items()})
    loop.cancel()
    return found


def _is_block(bundle: Bundle, drafter: str) -> bool:
    return next(entry.kind for entry in bundle.manifest.drafters if entry.name == drafter) == "block"


def engine_with_inner_outputs(bundle: Bundle, name: str) -> OrtGraphEngine:
    """The engine of a drafter's graph whose named inner values are outputs too."""
    entry = bundle.files.graph(name, prefer=("onnxruntime-cpu",))
    path = bundle.files.path(entry.file)
    model = onnx.load(path, load_external_data=False)
    outputs = {value.name for value in model.graph.output}
    inner = {output for node in model.graph.node for output in node.output} - outputs
    typed = {value.name: value for value in model.graph.value_info}
    for value in sorted(inner):
        if value in _INNER or value.startswith(_INNER_PREFIXES):
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


class _RecordingEngine:
    """Passes everything on and remembers inputs and outputs of every pass."""

    def __init__(self, engine: OrtGraphEngine, calls: list[tuple[str, dict[str, AnyArray]]]) -> None:
        self.name, self.slots, self.most_rows = engine.name, engine.slots, engine.most_rows
        self._engine: GraphEngine = engine
        self._calls = calls

    def allocate(self, batch: int, capacity: int) -> CacheMemory:
        return self._engine.allocate(batch, capacity)

    def open(self, memory: CacheMemory) -> GraphRunner:
        return _RecordingRunner(self.name, self._engine.open(memory), self._calls)


class _RecordingRunner:
    def __init__(self, name: str, runner: GraphRunner, calls: list[tuple[str, dict[str, AnyArray]]]) -> None:
        self._name, self._runner, self._calls = name, runner, calls

    def select(self, first: int, count: int) -> None:
        self._runner.select(first, count)

    def features(self, target: CacheMemory) -> FeatureStore:
        return self._runner.features(target)

    def feed(self, inputs: Mapping[str, Features]) -> None:
        self.run(inputs)

    def run(self, inputs: Mapping[str, Features]) -> dict[str, AnyArray]:
        found = self._runner.run(inputs)
        self._calls.append((self._name, {**{name: np.asarray(value) for name, value in inputs.items()}, **found}))
        return found


class _RecordingLoop(DecodingLoop):
    """Remembers what the target said to the last proposal."""

    verified: dict[str, AnyArray]

    def _commit(
        self,
        sequence: SequenceState,
        proposal: Proposal,
        tree: TokenTree,
        verdict: Verdict | None,
        buffers: StepBuffers,
    ) -> Accepted:
        logits = buffers.logits[sequence.row, : len(tree)].copy()
        accepted = super()._commit(sequence, proposal, tree, verdict, buffers)
        self.verified = {
            "tree_tokens": np.array(tree.tokens),
            "tree_parents": np.array(tree.parents),
            "target_logits": logits,
            "accepted": np.array(len(accepted.tokens) - 1),
            "emitted": np.array(accepted.tokens),
        }
        drawn = proposal.parts[0].draft.probs if proposal.parts else None
        if drawn is not None:
            self.verified |= _of_rejection(tree.tokens[1:], drawn, logits, sequence.request.params)
        return accepted


def _of_rejection(
    drafts: Sequence[int], drawn: FloatArray, logits: FloatArray, params: SamplingParams
) -> dict[str, AnyArray]:
    """What speculative sampling decides by, see :func:`dspark_runtime.speculation.verify.verify_chain`."""
    target = np.stack([distribution(row, params) for row in logits[: len(drafts)]])
    places = np.arange(len(drafts)), np.array(drafts)
    rest = np.maximum(target - drawn[: len(drafts)], 0)
    mass = rest.sum(1, keepdims=True)
    residuals = np.where(mass > MIN_RESIDUAL, rest / np.maximum(mass, MIN_RESIDUAL), target)
    return {"accept_probs": np.minimum(1, target[places] / drawn[places]), "residuals": residuals}


def _of_block(calls: Sequence[tuple[str, dict[str, AnyArray]]]) -> dict[str, AnyArray]:
    """One round of a block drafter; several passes (a long prompt) are joined along the context."""
    joined: dict[str, Any] = {}
    for _, arrays in calls:
        rows = int(arrays["block_positions"][0, 0] - arrays[WRITE_INDICES][0])
        for name, array in arrays.items():
            if name in (ATTENTION_MASK, WRITE_INDICES, TEMPERATURE, UNIFORMS):
                continue
            if len(array) == 0:  # distributions of a greedy draft: there are none
                continue
            single = array[0]
            if name.startswith(_PER_CONTEXT_ROW):
                single = single[:rows]
                if name in joined:
                    single = np.concatenate([joined[name], single])
            joined[name] = single
    if ANCHOR_IDS in joined:
        joined["anchor_id"] = joined.pop(ANCHOR_IDS)
    return joined


def _of_passes(calls: Sequence[tuple[str, dict[str, AnyArray]]]) -> dict[str, AnyArray]:
    """One round of a drafter that steps: the pass that takes in context, then the levels of the tree."""
    named: dict[str, AnyArray] = {}
    for place, (_, arrays) in enumerate(calls):
        stage = "extend" if place == 0 else f"step{place}"
        named.update({f"{stage}.{name}": array[0] for name, array in arrays.items()})
    return named


def save_trace(arrays: Mapping[str, AnyArray], out: Path) -> None:
    """Write the arrays as an uncompressed .npz, whole or not at all."""
    partial = out.with_name(f".{out.name}.partial")
    try:
        with partial.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)
