"""The most likely continuations of a block, grown slot by slot: the source of a block drafter's tree.

A slot's distribution depends on the token before it only through the Markov head, which is cheap to evaluate for
several tokens. So each slot is asked for the ``width`` most likely texts up to it, not only for the chain. Every likely
next token of those is a node; the most likely nodes are the texts the next slot is asked for.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

CANDIDATES = 8
"""Most likely tokens a block drafter returns per slot and per text it follows; trees are made from them."""
BEAMS = 4
"""Texts of a block that are followed from slot to slot. With SmolLM2's drafter, trees of 24 drafts from 4 texts of 8
candidates have the accepted length of those from 8 of 8; from 4 of 4 they lose 0.04, from the chain alone 0.15."""


class BeamNodes(NamedTuple):
    """Nodes [batch, nodes] in order of their slots: ``tokens`` int64, ``probs`` float32 given the nodes above, at
    temperature 1, ``parents`` int64: a node's place, -1 for the anchor. Children of one parent are adjacent, the
    most likely first."""

    tokens: torch.Tensor
    probs: torch.Tensor
    parents: torch.Tensor


class Beams:
    """Grows the nodes. ``width``: texts followed from slot to slot, at most ``candidates``, next tokens of each."""

    def __init__(self, width: int, candidates: int) -> None:
        self._width, self._candidates = min(width, candidates), candidates
        self._reach: torch.Tensor | None = None  # [batch, beams] how likely the text of a beam is
        self._ends: torch.Tensor | None = None  # [batch, beams] its last node
        self._found: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self._nodes = 0

    def step(self, allowed: torch.Tensor, ids: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """The next slot, from its logits [batch, beams, n], or [batch, 1, n] if all beams share them.

        ``ids`` int64 [batch, n]: what the columns stand for, None for their number. Returns the last tokens of the
        beams that go on, and which beams of the slot before they come from; both int64 [batch, beams].
        """
        index = torch.topk(allowed, self._candidates)[1]
        probs = torch.softmax(allowed, -1).gather(2, index)
        if ids is not None:
            index = ids[:, None].expand(-1, index.shape[1], -1).gather(2, index)
        if self._reach is None or self._ends is None:
            reach, parents = probs, torch.full_like(index, -1)
        else:
            index, probs = (part.expand(-1, self._width, -1) for part in (index, probs))
            reach, parents = probs * self._reach[..., None], self._ends[..., None].expand(-1, -1, self._candidates)
        tokens, count = index.flatten(1), reach.shape[1] * self._candidates
        self._found.append((tokens, probs.flatten(1), parents.flatten(1)))
        self._reach, place = torch.topk(reach.flatten(1), self._width)
        self._ends = place + self._nodes
        self._nodes += count
        return tokens.gather(1, place), torch.div(place, self._candidates, rounding_mode="floor")

    def finished(self) -> BeamNodes:
        """All nodes of the steps made."""
        return BeamNodes(*(torch.cat(part, 1) for part in zip(*self._found, strict=True)))


def node_count(drafts: int, width: int, candidates: int) -> int:
    """How many nodes ``drafts`` slots have."""
    return candidates + (drafts - 1) * min(width, candidates) * candidates
