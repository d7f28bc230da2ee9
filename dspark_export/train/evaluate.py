"""Accepted length on held-out greedy responses, as the runtime would reach it, without running the target again.

A greedy response is what the target says after each of its prefixes, so a draft is accepted exactly as far as it agrees
with the response.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dspark_export.train.features import Sample, collate
from dspark_export.train.module import TrainableDrafter

_BLOCKS = 512  # blocks of one pass


@dataclass(frozen=True)
class Evaluation:
    """``accepted_length`` counts the correction or bonus token. By slot: ``survival``, share of rounds in which it and
    all before it were right; ``logits``, ``right`` [rounds, block]: confidence logits, and whether slots survived."""

    accepted_length: float
    rounds: int
    survival: tuple[float, ...]
    logits: np.ndarray
    right: np.ndarray


@torch.no_grad()
def evaluate(model: TrainableDrafter, samples: Sequence[Sample], dtype: torch.dtype) -> Evaluation:
    """Draft through every sample from the first token of its response to its end."""
    device, block = model.fc.weight.device, model.geometry.block
    logits, right = [], []
    for sample in samples:
        first, last = max(1, sample.start), len(sample.ids) - 1
        if last <= first:
            continue
        batch = collate([sample], dtype, device)
        anchors = torch.arange(first, last, device=device)
        drafted, confidence = [], []
        for part in torch.split(anchors, _BLOCKS):
            hidden = model(batch.features, batch.ids, part[None])
            tokens, scores = model.draft(hidden[0], batch.ids[0, part])
            drafted.append(tokens)
            confidence.append(scores)
        tokens_np, scores_np = torch.cat(drafted).cpu().numpy(), torch.cat(confidence).float().cpu().numpy()
        at = first
        while at < last:
            room = min(block, last - at)
            agrees = tokens_np[at - first, :room] == sample.ids[at + 1 : at + 1 + room]
            kept = int(np.argmin(agrees)) if not agrees.all() else room
            if room == block:  # shorter ones say nothing about the later slots
                logits.append(scores_np[at - first])
                right.append(np.arange(block) < kept)
            at += kept + 1
    rounds = len(right)
    survived = np.array(right).mean(0) if rounds else np.zeros(block)
    return Evaluation(
        float(1 + survived.sum()),
        rounds,
        tuple(float(s) for s in survived),
        np.array(logits, np.float32).reshape(-1, block),
        np.array(right, np.bool_).reshape(-1, block),
    )
