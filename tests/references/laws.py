"""Distributions as they are, not as samples show them: every uniform number a sampler can get is counted.

Uniforms are multiples of 2**-24, see :func:`dspark_runtime.speculation.sampling.uniforms`. A draw by inverse CDF maps
each run of neighbouring uniforms to one token, and an acceptance holds up to some uniform, so the ends of the runs are
found by bisection and a probability is a run's length.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from dspark_runtime.speculation.sampling import SamplingParams, draw_token, inverse_cdf
from dspark_runtime.speculation.verify import verify_chain

Array = np.ndarray[Any, Any]
Value = TypeVar("Value", bound=Hashable)

UNIFORMS = 1 << 24
_LOOKS = 256
"""Uniforms evenly apart that are looked at in any case, so that a value with several runs is counted too."""


def law(of: Callable[[float], Value]) -> dict[Value, float]:
    """Probability of each value of a function of one uniform number in [0, 1)."""
    counts: dict[Value, int] = defaultdict(int)

    def split(low: int, high: int, first: Value, last: Value) -> None:
        """Count the uniforms of [low, high); ``first`` and ``last`` are the values at its two ends."""
        if first == last:
            counts[first] += high - low
            return
        middle = (low + high) // 2
        split(low, middle, first, of((middle - 1) / UNIFORMS))
        split(middle, high, of(middle / UNIFORMS), last)

    step = UNIFORMS // _LOOKS
    for low in range(0, UNIFORMS, step):
        split(low, low + step, of(low / UNIFORMS), of((low + step - 1) / UNIFORMS))
    return {value: count / UNIFORMS for value, count in counts.items()}


def token_law(of: Callable[[float], int], vocab: int) -> Array:
    """:func:`law` of a token, as probabilities [vocab]."""
    probabilities = np.zeros(vocab)
    for token, probability in law(of).items():
        probabilities[token] = probability
    return probabilities


@dataclass
class _Chosen:
    """A sampler whose acceptances are given, and which says what it was asked to draw from instead of drawing."""

    params: SamplingParams
    accept: Sequence[float]
    draw_of: Callable[[float], int] | None = None
    key: bytes = b""

    def accept_at(self, position: int) -> float:
        return self.accept[position - 1]

    def draw_from(self, weights: Array, position: int) -> int:
        self.draw_of, self.key = lambda uniform: inverse_cdf(weights, uniform), b"weights" + weights.tobytes()
        return -1

    def draw(self, logits: Array, position: int) -> int:
        self.draw_of, self.key = lambda uniform: draw_token(logits, self.params, uniform), b"logits" + logits.tobytes()
        return -1


class ChainLaw:
    """What ``verify_chain`` emits for chains verified with the same logits float32 [drafts + 1, vocab]."""

    def __init__(self, logits: Array, params: SamplingParams) -> None:
        self.logits, self.params = logits, params
        self._draws: dict[bytes, Array] = {}

    def of(self, drafts: Sequence[int], probs: Array) -> list[Array]:
        """Joint probabilities float64 [vocab]: entry i is that ``i`` drafts are accepted and which token follows.

        ``probs`` float32 [drafts, vocab]: what the chain was drawn from.
        """
        found, reached = [], 1.0
        for place in range(len(drafts)):
            accepted = law(lambda uniform, place=place: self._accepts(drafts, probs, place, uniform)).get(True, 0.0)
            rejected = reached * (1 - accepted)
            found.append(rejected * self._draw(drafts, probs, place) if rejected else np.zeros(self.logits.shape[1]))
            reached *= accepted
        return [*found, reached * self._draw(drafts, probs, len(drafts)) if reached else 0 * found[0]]

    def _run(self, drafts: Sequence[int], probs: Array, place: int, uniform: float) -> tuple[int, list[int], _Chosen]:
        """Accept before ``place`` if any uniform does, and decide there with ``uniform``."""
        count = len(drafts)
        sampler: Any = _Chosen(self.params, [0.0] * place + [uniform] + [1 - 1 / UNIFORMS] * (count - place))
        verdict = verify_chain(drafts, probs, self.logits[: count + 1], sampler, 0)
        assert len(verdict.tokens) == len(verdict.path) and verdict.tokens[:-1] == list(drafts[: len(verdict.path) - 1])
        return len(verdict.path) - 1, verdict.tokens, sampler

    def _accepts(self, drafts: Sequence[int], probs: Array, place: int, uniform: float) -> bool:
        return self._run(drafts, probs, place, uniform)[0] > place

    def _draw(self, drafts: Sequence[int], probs: Array, place: int) -> Array:
        """Law [vocab] of the token drawn after ``place`` accepted drafts, of which there is one."""
        accepted, tokens, sampler = self._run(drafts, probs, place, 1 - 1 / UNIFORMS)
        assert accepted == place and tokens[-1] == -1 and sampler.draw_of is not None
        if sampler.key not in self._draws:
            self._draws[sampler.key] = token_law(sampler.draw_of, self.logits.shape[1])
        return self._draws[sampler.key]
