"""Is a trained drafter fed what it should be, is it accepted as often as in PyTorch, and do its confidences decide
before the target verifies? The text is right whatever the answers are."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from dspark_export.drafts.recording import Call, record
from dspark_export.validate.checks import Check
from dspark_export.validate.drafts import Reference, in_pytorch
from dspark_export.validate.probe import with_float_products
from dspark_export.validate.references import ModelRunner
from dspark_export.validate.tolerances import ACCEPTANCE, ACCEPTANCE_QUANTIZED, AGAINST_MODEL, largest_relative
from dspark_runtime import Bundle
from dspark_runtime.arrays import AnyArray
from dspark_runtime.bundle.contract import ATTENTION_MASK, LOGIT_ROWS, PAST, WRITE_INDICES
from dspark_runtime.bundle.draft_contract import (
    ANCHOR_IDS,
    BLOCK_POSITIONS,
    CONFIDENCE_LOGITS,
    DRAFT_TOKENS,
    FEATURE_POSITIONS,
    TARGET_FEATURES,
    TEMPERATURE,
    UNIFORMS,
)
from dspark_runtime.bundle.manifest import DrafterEntry
from dspark_runtime.decoding.statistics import PositionCounts
from dspark_runtime.drafters.parts import DraftOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_features(
    bundle: Bundle, reference: Reference, model: PreTrainedModel, prompts: Sequence[Sequence[int]], tokens: int
) -> Check:
    """What the runtime feeds the drafter, at every position of real texts, against PyTorch's hidden states there."""
    began = time.perf_counter()
    taps = reference.entry.taps
    plain = ModelRunner(model, [], range(int(model.config.get_text_config().num_hidden_layers)), taps)
    bundle = with_float_products(bundle)
    worst, where, rows = 0.0, "", 0
    for number, prompt in enumerate(prompts):
        recorder, generation = record(bundle, prompt, reference.entry.name, tokens, DraftOptions(branches=1))
        calls, text = recorder.calls, generation.tokens
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
    quantized = bundle.manifest.precision.quantized
    limit = ACCEPTANCE_QUANTIZED if quantized else ACCEPTANCE
    mine = [PositionCounts() for _ in range(entry.block.drafts)]
    theirs = [PositionCounts() for _ in range(entry.block.drafts)]
    for prompt in prompts:
        _, generation = record(bundle, prompt, entry.name, tokens, DraftOptions(branches=1))
        text, stats = generation.tokens, generation.stats
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
            if spec.name.startswith(PAST)
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
            recorder, _ = record(bundle, prompt, entry.name, tokens, options)
            calls, trees = recorder.calls, {r.position: r.tree for r in recorder.rounds}
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
        message=f"{late} of {verified} verified drafts come after one whose confidence is below the threshold: the "
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
