"""Which tokens a block drafter drafts: the most likely, or drawn with given random numbers where the temperature is
above 0.

Distributions exist only for the ``drawn`` sequences, those with a temperature: in a greedy call those tensors have no
rows and the arithmetic on them costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch


class Choice(NamedTuple):
    """What a block pass drafts, by draft id.

    ``tokens`` [batch, slots]; ``probs`` [drawn, slots, draft vocab], what they were drawn from; ``candidates`` [batch,
    slots, c] and their probabilities at temperature 1; ``corrected`` logits [batch, slots, draft vocab].
    """

    tokens: torch.Tensor
    probs: torch.Tensor
    candidates: torch.Tensor
    candidate_probs: torch.Tensor
    corrected: torch.Tensor


def inverse_cdf(probs: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """First index [..., 1] where a row's running sum of ``probs`` [..., n] passes ``uniforms`` [..., 1] of its total.

    There always is one, of a probability above 0: numbers below 1 times the total are below the total.
    """
    sums = torch.cumsum(probs, -1)
    return (sums > uniforms * sums[..., -1:]).float().argmax(-1, keepdim=True)


class Draws:
    """Chooses slot by slot. ``temperature`` float32 [batch], ``uniforms`` float32 [batch, slots] in [0, 1)."""

    def __init__(self, temperature: torch.Tensor, uniforms: torch.Tensor) -> None:
        self._drawn = torch.nonzero(temperature > 0)[:, 0]  # which sequences draw: none in a greedy call
        self._heat, self._chances = self._of_drawn(temperature)[:, None], self._of_drawn(uniforms)
        self._indices: list[torch.Tensor] = []
        self._corrected: list[torch.Tensor] = []
        self._found: list[torch.Tensor] = []
        self._spreads: list[torch.Tensor] = []

    def _of_drawn(self, values: torch.Tensor) -> torch.Tensor:
        return values.index_select(0, self._drawn)

    def _by_slot(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """[rows, n] of every slot as [rows, slots, n]."""
        return torch.cat(parts, 1).reshape(-1, len(parts), parts[0].shape[1])

    def step(self, corrected: torch.Tensor, allowed: torch.Tensor, candidates: int) -> torch.Tensor:
        """Index [batch, 1] chosen for the next slot from logits [batch, n]; ``allowed`` is -inf where none may be."""
        best = allowed.argmax(-1, keepdim=True) if candidates == 1 else torch.topk(allowed, candidates)[1]
        spread = torch.softmax(self._of_drawn(allowed) / self._heat, -1)
        slot = len(self._indices)
        drawn = inverse_cdf(spread, self._chances[:, slot : slot + 1])
        index = best[:, :1].scatter(0, self._drawn[:, None], drawn)
        for whole, part in (
            (self._indices, index),
            (self._corrected, corrected),
            (self._found, best),
            (self._spreads, spread),
        ):
            whole.append(part)
        return index

    def finished(self, allowed: Callable[[torch.Tensor], torch.Tensor]) -> Choice:
        """The choice of all steps made; ``allowed`` makes logits -inf where nothing may be drafted."""
        corrected, candidates = self._by_slot(self._corrected), self._by_slot(self._found)
        likely = torch.softmax(allowed(corrected), -1).gather(2, candidates)
        return Choice(torch.cat(self._indices, 1), self._by_slot(self._spreads), candidates, likely, corrected)

    def finished_among(self, few: torch.Tensor, base: torch.Tensor) -> Choice:
        """The same where the steps chose among ids ``few`` [batch, slots, k]; all others are impossible."""
        among, best = self._by_slot(self._corrected), self._by_slot(self._found)
        likely = torch.softmax(among, -1).gather(2, best)
        nothing = torch.zeros_like(self._of_drawn(base))
        probs = nothing.scatter(2, self._of_drawn(few), self._by_slot(self._spreads))
        corrected = torch.full_like(base, float("-inf")).scatter(2, few, among)
        tokens = few.gather(2, torch.cat(self._indices, 1)[..., None])[..., 0]
        return Choice(tokens, probs, few.gather(2, best), likely, corrected)

    def at_once(self, logits: torch.Tensor, allowed: torch.Tensor, candidates: int) -> Choice:
        """All slots [batch, slots, n] together, where no slot depends on the one before; ``allowed`` as in a step."""
        best = torch.topk(allowed, candidates)[1]
        likely = torch.softmax(allowed, -1).gather(2, best)
        probs = torch.softmax(self._of_drawn(allowed) / self._heat[:, None], -1)
        index = inverse_cdf(probs, self._chances[..., None])[..., 0]
        where = self._drawn[:, None].expand(-1, logits.shape[1])
        # Base and corrected logits are equal here, yet two values of the graph.
        return Choice(best[..., 0].scatter(0, where, index), probs, best, likely, logits * 1.0)
