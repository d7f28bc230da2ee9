"""A draft tree that grows level by level from the logits of a drafter that makes one pass per level.

Each level's pass runs the most promising nodes of the level before it. A node is a token with the probability the
drafter gives it; its *chance* is the product of the estimated acceptance of the nodes above it and its own.
"""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np

from dspark_runtime.arrays import FloatArray, IntArray
from dspark_runtime.drafters.base import Draft, DraftRequest
from dspark_runtime.drafters.estimates import DraftSampling, bucket, over_target
from dspark_runtime.speculation.sampling import inverse_cdf
from dspark_runtime.speculation.tree import MAX_ROWS, TokenTree


class Growth:
    """The growing proposal of one sequence.

    Args:
        request: what is wanted.
        depth: most levels.
        width: nodes run per level, and children looked at per node; 1 for a chain.
        sampling: how tokens are drafted for a request with a temperature, see :class:`BlockDrafter`; ``rejection`` and
            ``coupled`` give chains.
        vocab_size: of the target. ``target_ids``: the target's id of every draft token, None where they are the same.
    """

    def __init__(
        self,
        request: DraftRequest,
        depth: int,
        width: int,
        sampling: DraftSampling,
        vocab_size: int,
        target_ids: IntArray | None,
    ) -> None:
        self.request = request
        self.drawn = request.temperature > 0 and sampling != "greedy"
        self.width = 1 if self.drawn else width
        self.depth = min(depth, request.limit)
        self.level = 0
        self.tokens, self.parents = [request.tokens[-1]], [-1]
        self.classes: list[Hashable] = []
        self.estimates: list[float] = [1.0]
        self.passes: dict[int, int] = {}  # node -> its place among the rows the drafter ran behind the context
        self.frontier: list[int] = []
        self._chances = [1.0]
        self._sampling = sampling
        self._vocab_size = vocab_size
        self._target_ids = target_ids
        self._probs: list[FloatArray] = []

    @property
    def open(self) -> bool:
        """Whether another level is wanted."""
        return bool(self.frontier)

    def grow(self, nodes: list[int], logits: FloatArray) -> None:
        """Add the children of ``nodes``, which gave ``logits`` [nodes, draft vocab], and choose the next level."""
        added: list[int] = []
        for node, row in zip(nodes, logits, strict=True):
            added += [self._draw(node, row)] if self.drawn else self._expand(node, row)
        self.level += 1
        best = sorted(added, key=lambda node: (-self._chances[node], node))[: self.width]
        floor = 0.0 if self.drawn and self._sampling == "rejection" else self.request.floor
        self.frontier = [n for n in best if self._chances[n] >= floor] if self.level < self.depth else []

    def _expand(self, node: int, logits: FloatArray) -> list[int]:
        top = float(logits.max())
        total = float(np.exp(logits - top).sum())
        if self.width == 1:
            order = [int(logits.argmax())]
        else:
            few = np.argpartition(logits, -self.width)[-self.width :]
            order = sorted(few.tolist(), key=lambda i: (-logits[i], i))
        return [
            self._add(node, index, float(np.exp(logits[index] - top)) / total, rank)
            for rank, index in enumerate(order)
            if len(self.tokens) < MAX_ROWS
        ]

    def _draw(self, node: int, logits: FloatArray) -> int:
        sampler = self.request.sampler
        assert sampler is not None  # a request with a temperature has one
        weights = np.exp((logits - logits.max()) * np.float32(1.0 / self.request.temperature))
        probs = (weights / weights.sum()).astype(np.float32)
        position = len(self.request.tokens) + self.level
        uniform = float(sampler.draft_uniforms(position, 1, self._sampling == "coupled")[0])
        index = inverse_cdf(probs, uniform)
        if self._sampling == "rejection":
            self._probs.append(over_target(probs, self._vocab_size, self._target_ids))
        return self._add(node, index, float(probs[index]), 0)

    def _add(self, parent: int, index: int, prob: float, rank: int) -> int:
        kind = ("beside" if rank else "probability", bucket(prob))
        self.tokens.append(index if self._target_ids is None else int(self._target_ids[index]))
        self.parents.append(parent)
        self.classes.append(kind)
        self.estimates.append(prob)
        self._chances.append(self._chances[parent] * self.request.rate(kind))
        return len(self.tokens) - 1

    def row_mask(self, node: int) -> list[int]:
        """Places, among the rows run behind the context, that the pass of ``node`` sees: its ancestors'."""
        seen = []
        node = self.parents[node]
        while node > 0:
            seen.append(self.passes[node])
            node = self.parents[node]
        return seen

    def ran(self, tokens: list[int]) -> list[int]:
        """Places of the rows run for the nodes that lie on the path of ``tokens``, from the anchor on."""
        node, places = 0, []
        for token in tokens:
            node = next((n for n in self.passes if self.parents[n] == node and self.tokens[n] == token), -1)
            if node < 0:
                break
            places.append(self.passes[node])
        return places

    def result(self) -> Draft | None:
        """What was grown; None if nothing."""
        if len(self.tokens) == 1:
            return None
        if self._probs:
            return Draft(TokenTree.chain(self.tokens[0], self.tokens[1:]), (), np.stack(self._probs))
        tree = TokenTree(self.tokens, self.parents)
        return Draft(tree, self.classes, None, self.estimates[1:] if tree.is_chain else ())
