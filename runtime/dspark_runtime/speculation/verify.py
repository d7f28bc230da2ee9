"""Reference implementation of verification: which drafts are accepted, and which token follows them.

Deterministic drafts (greedy drafters, n-gram, any tree): :func:`verify_tree` draws the target's token at each row and
follows the child that holds it. The emitted tokens are the target's own draws, so no drafter can change them.
Sampled drafts (a chain drawn from a draft distribution q): :func:`verify_chain`, speculative sampling after Leviathan
et al. 2023 (algorithm 1) and Chen et al. 2023 (algorithm 2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dspark_runtime.arrays import FloatArray
from dspark_runtime.speculation.sampling import Sampler, distribution
from dspark_runtime.speculation.tree import TokenTree

MIN_RESIDUAL = 1e-8  # a smaller residual mass is rounding: p and q are the same distribution


@dataclass(frozen=True, slots=True)
class Verdict:
    """``path``: accepted rows, the anchor first. ``tokens``: what is emitted, one per row of the path (the last one is
    the correction or bonus token, which is not in the tree)."""

    path: list[int]
    tokens: list[int]


def verify_tree(tree: TokenTree, logits: FloatArray, draw: Callable[[FloatArray, int], int], start: int) -> Verdict:
    """Follow the target's own draws through ``tree``.

    Args:
        tree: what was verified.
        logits: float32 [rows, vocab] of the pass.
        draw: token for a position, from one row of logits; called once per row of the accepted path.
        start: position of the anchor.
    """
    row, path, tokens = 0, [0], []
    while True:
        token = draw(logits[row], start + len(path))
        tokens.append(token)
        row = tree.child(row, token)
        if row < 0:
            return Verdict(path, tokens)
        path.append(row)


def verify_chain(
    drafts: Sequence[int], draft_probs: FloatArray, logits: FloatArray, sampler: Sampler, start: int
) -> Verdict:
    """Accept each draft with probability min(1, p/q); on rejection draw from norm(max(p - q, 0)).

    Args:
        drafts: the chain without its anchor, each drawn from its row of ``draft_probs``.
        draft_probs: float32 [drafts, vocab], exactly what was sampled from.
        logits: float32 [drafts + 1, vocab] of the pass.
        sampler: temperature, filters and random numbers of the request; its temperature is above 0.
        start: position of the anchor.
    """
    for i, token in enumerate(drafts):
        target = distribution(logits[i], sampler.params)
        position = start + 1 + i
        if not sampler.accept_at(position) * float(draft_probs[i, token]) < float(target[token]):
            residual = np.maximum(target - draft_probs[i], 0)
            weights = residual if float(residual.sum()) > MIN_RESIDUAL else target
            last = sampler.draw_from(weights, position)
            return Verdict(list(range(i + 1)), [*drafts[:i], last])
    count = len(drafts)
    return Verdict(list(range(count + 1)), [*drafts, sampler.draw(logits[count], start + 1 + count)])
