"""The likeliest tokens of a row of logits."""

from __future__ import annotations

import math

import numpy as np

from dspark_runtime.arrays import FloatArray

MOST = 8
LEAST = 0.01  # of the likeliest token's probability
_BELOW = np.float32(math.log(LEAST))


def top_tokens(logits: FloatArray) -> tuple[list[int], list[float]]:
    """The likeliest tokens, at most 8, the likeliest first, and their probabilities.

    Tokens below a hundredth of the likeliest one's probability count for nothing: the sum over the vocabulary would
    take longer than all the rest.

    Args:
        logits: float32 [vocab].
    """
    best = logits.max()
    near = np.flatnonzero(logits >= best + _BELOW)
    weights = np.exp(logits[near] - best)
    order = np.argsort(-weights, kind="stable")[:MOST]
    return near[order].tolist(), (weights[order] / weights.sum()).tolist()
