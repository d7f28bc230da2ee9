"""Every intermediate of the first rounds of a trained drafter, by name, for debugging a draft that is rarely accepted.

The bundle's own graphs run in the bundle's own loop; the drafter's graph returns its inner values as additional
outputs. Arrays carry no batch dimension. Round 0 has plain names, later rounds have the prefixes ``round1.``,
``round2.``, ...

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
candidate_tokens     [drafts, candidates]        most likely tokens of each slot
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

from dspark_export.drafts.recording import INNER_PREFIXES, MOST_DRAFTS, Call, RecordedRound, record
from dspark_runtime import Bundle
from dspark_runtime.arrays import AnyArray, FloatArray
from dspark_runtime.bundle.contract import ATTENTION_MASK, WRITE_INDICES
from dspark_runtime.bundle.draft_contract import ANCHOR_IDS, CTX_FEATURES, TEMPERATURE, UNIFORMS
from dspark_runtime.drafters.parts import DraftOptions
from dspark_runtime.errors import UsageError
from dspark_runtime.speculation.sampling import SamplingParams, distribution
from dspark_runtime.speculation.verify import MIN_RESIDUAL

_PER_CONTEXT_ROW = (CTX_FEATURES, *INNER_PREFIXES, "target_features", "feature_positions")


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
    trained = {e.name: e.kind for e in bundle.manifest.drafters if e.trained}
    if drafter not in trained:
        raise UsageError(f"{drafter!r} is not a trained drafter of this bundle; it has {', '.join(trained) or 'none'}")
    room = bundle.limits.positions - len(prompt)
    tokens = min(rounds * (MOST_DRAFTS + 1) + 1, room)
    params = params or SamplingParams()
    recorder, generation = record(
        bundle, prompt, drafter, tokens, options or DraftOptions(), params=params, seed=seed, rounds=rounds, logits=True
    )
    found: dict[str, AnyArray] = {"prompt_ids": np.array(prompt), "first_token": np.array(generation.tokens[0])}
    for number, recorded in enumerate(recorder.rounds[:rounds]):
        prefix = f"round{number}." if number else ""
        drafting = _of_block(recorded.calls) if trained[drafter] == "block" else _of_passes(recorded.calls)
        found.update({prefix + name: array for name, array in {**drafting, **_of_target(recorded, params)}.items()})
    return found


def _of_target(recorded: RecordedRound, params: SamplingParams) -> dict[str, AnyArray]:
    """What the target made of one round's drafts."""
    tree, logits = recorded.tree, recorded.logits
    assert logits is not None  # they were requested
    found: dict[str, AnyArray] = {
        "tree_tokens": np.array(tree.tokens),
        "tree_parents": np.array(tree.parents),
        "target_logits": logits,
        "accepted": np.array(len(recorded.tokens) - 1),
        "emitted": np.array(recorded.tokens),
    }
    if recorded.drawn is not None:
        found |= _of_rejection(tree.tokens[1:], recorded.drawn, logits, params)
    return found


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


def _of_block(calls: Sequence[Call]) -> dict[str, AnyArray]:
    """One round of a block drafter; several passes (a long prompt) are joined along the context."""
    joined: dict[str, Any] = {}
    for call in calls:
        arrays = {**call.inputs, **call.found}
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


def _of_passes(calls: Sequence[Call]) -> dict[str, AnyArray]:
    """One round of a drafter that steps: the pass that takes in context, then the levels of the tree."""
    named: dict[str, AnyArray] = {}
    for place, call in enumerate(calls):
        stage = "extend" if place == 0 else f"step{place}"
        named.update({f"{stage}.{name}": array[0] for name, array in {**call.inputs, **call.found}.items()})
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
