"""How drafters rate their own drafts, and distributions over a draft's vocabulary in the target's numbering."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Hashable, Sequence
from typing import Literal

import numpy as np

from dspark_runtime.arrays import FloatArray, IntArray

DraftSampling = Literal["greedy", "coupled", "rejection"]
"""How trained drafters draft for requests with a temperature. ``greedy``: the most likely tokens. ``coupled``: drawn
with the target's own random numbers; the text stays that of plain decoding. ``rejection``: drawn independently and
verified by rejection sampling; the text keeps its distribution."""

EDGES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97)
_CENTRES = (0.05, 0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.94, 0.985)
_UNKNOWN = 0.6


def bucket(estimate: float, edges: Sequence[float] = EDGES) -> int:
    """Number of the bucket, 0 to ``len(edges)``, that an estimated acceptance falls into."""
    return bisect_right(edges, estimate)


def expected(kind: Hashable) -> float:
    """Acceptance of a class (kind of estimate, bucket of it): its middle, the estimate taken at its word."""
    return _CENTRES[kind[1]] if isinstance(kind, tuple) else _UNKNOWN


def over_target(probs: FloatArray, vocab_size: int, target_ids: IntArray | None) -> FloatArray:
    """float32 [..., vocab_size] over the target's ids, of ``probs`` [..., draft vocab].

    ``target_ids``: the target's id of every draft token, None where they are the same.
    """
    if target_ids is None and probs.shape[-1] == vocab_size:
        return probs
    wide = np.zeros((*probs.shape[:-1], vocab_size), np.float32)
    wide[..., np.arange(probs.shape[-1]) if target_ids is None else target_ids] = probs
    return wide
