"""The terms of the loss: cross-entropy, distance of distributions, and the confidences' own.

Of the target's distribution only its most likely tokens are kept. Whatever mass either distribution has elsewhere
counts as not shared, so the distance is an upper bound, and exact where the rest is empty.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from dspark_export.train.module import TrainableDrafter


@dataclass(frozen=True)
class Slots:
    """What the slots of a pass should have said; all tensors [batch, anchors, block], or with one more dimension.

    ``labels``: the next tokens; ``previous``: the token before each; ``weights``: 0 where a slot does not count;
    ``top_ids``, ``top_probs`` [..., top]: the target's most likely tokens there.
    """

    labels: Tensor
    previous: Tensor
    weights: Tensor
    top_ids: Tensor
    top_probs: Tensor


@dataclass(frozen=True)
class Terms:
    """Weighted sums over slots, and the sum of weights; ``agreement``: the mean chance that a slot is accepted."""

    ce: Tensor
    distance: Tensor
    confidence: Tensor
    agreement: Tensor
    weight: Tensor


def terms(model: TrainableDrafter, hidden: Tensor, slots: Slots, chunk: int) -> Terms:
    """All terms of the slots that count, ``chunk`` slots at a time so that memory does not grow with their number."""
    chosen = slots.weights > 0
    correction = embedded = None
    if model.markov_head is not None:
        correction, embedded = (rows[chosen] for rows in model.markov_head.rows(hidden, slots.previous))
    rows, weights = hidden[chosen], slots.weights[chosen]
    labels, ids, probs = slots.labels[chosen], slots.top_ids[chosen], slots.top_probs[chosen]
    sums = [hidden.new_zeros((), dtype=torch.float32) for _ in range(4)]
    several = len(rows) > chunk
    for start in range(0, len(rows), chunk):
        part = slice(start, start + chunk)
        inputs = (
            rows[part],
            None if correction is None else correction[part],
            None if embedded is None else embedded[part],
            weights[part],
            labels[part],
            ids[part],
            probs[part],
        )
        found = checkpoint(_part, model, *inputs, use_reentrant=False) if several else _part(model, *inputs)
        sums = [total + new for total, new in zip(sums, found, strict=True)]
    return Terms(sums[0], sums[1], sums[2], sums[3], weights.sum())


def _part(
    model: TrainableDrafter,
    rows: Tensor,
    correction: Tensor | None,
    embedded: Tensor | None,
    weights: Tensor,
    labels: Tensor,
    ids: Tensor,
    probs: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    log_probs = torch.log_softmax(model.logits(rows, correction).float(), -1)
    places = model.places[torch.cat([labels[:, None], ids], 1)]
    inside = places >= 0
    gathered = log_probs.gather(1, places.clamp_min(0))  # once: its gradient is as large as all logits
    ce = -gathered[:, 0] * inside[:, 0]
    inside = inside[:, 1:]
    mine = gathered[:, 1:].exp() * inside
    theirs = probs * inside
    elsewhere = (1 - mine.sum(1)).clamp_min(0) + (1 - theirs.sum(1)).clamp_min(0)
    distance = (mine - theirs).abs().sum(1) + elsewhere
    agreement = (1 - 0.5 * distance).detach()
    confidence = torch.zeros_like(distance)
    if model.confidence_head is not None:
        logits = model.confidence(rows, embedded).float()
        confidence = functional.binary_cross_entropy_with_logits(logits, agreement.clamp(0, 1), reduction="none")
    return (weights * ce).sum(), (weights * distance).sum(), (weights * confidence).sum(), (weights * agreement).sum()
