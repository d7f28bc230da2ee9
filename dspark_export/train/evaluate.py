"""Accepted length on held-out greedy responses, as the runtime would reach it, without running the target again.

A greedy response is what the target says after each of its prefixes, so a draft is accepted exactly as far as it agrees
with the response.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dspark_export.drafts.modules.beams import BEAMS, CANDIDATES, BeamNodes, Beams
from dspark_export.train.features import Sample, collate
from dspark_export.train.module import TrainableDrafter
from dspark_runtime.drafters.beams import BeamLayout
from dspark_runtime.speculation.tree import TokenTree

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


@torch.no_grad()
def tree_lengths(
    model: TrainableDrafter, samples: Sequence[Sample], dtype: torch.dtype, sizes: Sequence[int]
) -> dict[int, float]:
    """Accepted length of trees of up to ``sizes`` drafts, made as the runtime makes them, by size."""
    device, block = model.fc.weight.device, model.geometry.block
    candidates = min(CANDIDATES, len(model.draft_ids))
    layout = BeamLayout(block, BEAMS, candidates)
    rounds, accepted = dict.fromkeys(sizes, 0), dict.fromkeys(sizes, 0)
    for sample in samples:
        first, last = max(1, sample.start), len(sample.ids) - 1
        if last <= first:
            continue
        batch = collate([sample], dtype, device)
        anchors = torch.arange(first, last, device=device)
        parts = []
        for part in torch.split(anchors, _BLOCKS // BEAMS):
            hidden = model(batch.features, batch.ids, part[None])[0]
            parts.append(likely_texts(model, hidden, batch.ids[0, part], candidates))
        tokens, probs, parents = (torch.cat(each).cpu().numpy() for each in zip(*parts, strict=True))
        for size in sizes:
            at = first
            while at < last:
                row, depth = at - first, min(block, last - at)
                nodes = layout.tree(
                    tokens[row], probs[row], parents[row], most=size, depth=depth, children=candidates, least=0.0
                )
                tree, place, kept = TokenTree([int(sample.ids[at]), *nodes.tokens], [-1, *nodes.parents]), 0, 0
                while kept < depth and (place := tree.child(place, int(sample.ids[at + kept + 1]))) >= 0:
                    kept += 1
                rounds[size] += depth == block
                accepted[size] += kept if depth == block else 0
                at += kept + 1
    return {size: 1 + accepted[size] / max(1, rounds[size]) for size in sizes}


def likely_texts(model: TrainableDrafter, hidden: Tensor, anchor_ids: Tensor, candidates: int) -> BeamNodes:
    """The nodes of blocks ``hidden`` [blocks, block, hidden], as the drafter's graph gives them."""
    beams, head = Beams(BEAMS, candidates), model.markov_head
    texts = anchor_ids[:, None]
    state = hidden.new_zeros(len(hidden), 1, model.geometry.rank)
    for slot in range(hidden.shape[1]):
        row = hidden[:, slot, None].expand(-1, texts.shape[1], -1)
        correction = None
        if head is not None:
            state, correction = head.one(state, row, head.markov_w1(texts))
        ends, origins = beams.step(model.logits(row, correction).float())
        texts = model.draft_ids[ends]
        state = state.gather(1, origins[..., None].expand(-1, -1, state.shape[-1]))
    nodes = beams.finished()
    return nodes._replace(tokens=model.draft_ids[nodes.tokens])
