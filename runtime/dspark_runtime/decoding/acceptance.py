"""How likely drafts are to be accepted: learned by class of each drafter, and from what several say of one token.

A drafter alone is judged by its classes: how often rows of a class were the token that came, over all requests and
within the one at hand. Several drafters that propose into one tree know more together than the surest of them does. The
odds of a token are those of the surest drafter times one factor for each: by how sure it is of the token, that it
proposes another one for the place, or nothing. The factors are learned from every token that comes (logistic regression
with an offset, Adagrad: Duchi et al. 2011); as there are only thirteen for each drafter, a few hundred tokens teach
them. They begin at 1, that of another token at about a half: what n-gram, the store and trained drafters agree on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from itertools import chain
from typing import Any

from dspark_runtime.drafters.base import Draft, Drafter
from dspark_runtime.drafters.estimates import EDGES, bucket
from dspark_runtime.drafters.proposal import Proposal
from dspark_runtime.speculation.tree import TokenTree

MOST_RATE = 0.995
ANY: Hashable = "any"  # class of a place: whether one of the tokens proposed for it was right
SILENT, OTHER, _SURE = 0, 1, 2  # what a drafter says of a token; from _SURE on by how sure it is
_WORDS = _SURE + len(EDGES) + 1
_LEAST_RATE = 0.002
_FIRST = [0.0] * _WORDS  # logarithms of the factors before anything was seen
_FIRST[OTHER] = -0.6
_LEARNING_RATE = 0.2
_MOST_MOVED = 16.0  # so that a step never gets too short to follow a text that changes


def word(rate: float) -> int:
    """What a drafter says of a token that it expects to be accepted with probability ``rate``."""
    return _SURE + bucket(rate)


class Acceptance:
    """See the module's text."""

    _PRIOR_WEIGHT = 6.0
    _SHARED_WEIGHT = 8.0

    def __init__(self) -> None:
        self._shared: dict[tuple[str, Hashable], list[float]] = {}
        self._own: dict[int, dict[tuple[str, Hashable], list[float]]] = {}
        self._factors: dict[str, list[float]] = {}  # logarithms, by drafter and word
        self._moved: dict[str, list[float]] = {}  # sums of squared gradients

    # One drafter ---------------------------------------------------------------------------------------------------

    def rate(self, drafter: Drafter, kind: Hashable, request: int) -> float:
        """Probability that a row of this class is accepted, given that its parent is."""
        key = (drafter.name, kind)
        shared = self._shared.get(key)
        if shared is None:
            rate = drafter.prior(kind)
        else:
            rate = (shared[0] + self._PRIOR_WEIGHT * drafter.prior(kind)) / (shared[1] + self._PRIOR_WEIGHT)
        own = self._own.get(request)
        counts = own.get(key) if own else None
        if counts is None:
            return rate
        return (counts[0] + self._SHARED_WEIGHT * rate) / (counts[1] + self._SHARED_WEIGHT)

    def rates(self, drafter: Drafter, request: int) -> Callable[[Hashable], float]:
        """:meth:`rate` of one drafter and request, as a function of the class."""
        return lambda kind: self.rate(drafter, kind, request)

    def learn(self, drafter: Drafter, draft: Draft, emitted: Sequence[int], request: int) -> None:
        """Compare a draft, verified or not, with the tokens that really came."""
        for judged in _judged(draft.tree, emitted):
            for row, hit in judged:
                self._count(drafter.name, kind_of(draft, row), request, hit)
            # once, however many tokens were proposed for this place
            self._count(drafter.name, ANY, request, any(hit for _, hit in judged))

    def forget(self, request: int) -> None:
        """Drop what was learned for a finished request only."""
        self._own.pop(request, None)

    def _count(self, name: str, kind: Hashable, request: int, hit: bool) -> None:
        own = self._own.setdefault(request, {})
        for table, most in ((self._shared, 400.0), (own, 40.0)):
            _add(table, (name, kind), hit, most)

    # Several -------------------------------------------------------------------------------------------------------

    def together(self, names: Sequence[str], words: Sequence[int], surest: float) -> float:
        """Probability that a token is accepted of which several drafters say something.

        Args:
            names: of the drafters.
            words: what each of them says: :data:`SILENT`, :data:`OTHER` or :func:`word`.
            surest: the probability that the surest of them gives.
        """
        odds = _log_odds(surest)
        for name, said in zip(names, words, strict=True):
            odds += self._factors.get(name, _FIRST)[said]
        return _probability(odds)

    def learn_together(self, proposal: Proposal, emitted: Sequence[int]) -> None:
        """Compare what the drafters said of a merged proposal with the tokens that really came."""
        if not proposal.said:
            return
        names = [part.drafter.name for part in proposal.parts]
        for row, hit in chain.from_iterable(_judged(proposal.tree, emitted)):
            words = proposal.said[row]
            self._correct(names, words, hit - self.together(names, words, proposal.surest[row]))

    def _correct(self, names: Sequence[str], words: Sequence[int], error: float) -> None:
        """One step down the gradient of the logarithmic loss."""
        for name, said in zip(names, words, strict=True):
            factors = self._factors.setdefault(name, _FIRST.copy())
            moved = self._moved.setdefault(name, [1.0] * _WORDS)
            moved[said] = min(moved[said] + error * error, _MOST_MOVED)
            factors[said] += _LEARNING_RATE * error / math.sqrt(moved[said])


def _judged(tree: TokenTree, emitted: Sequence[int]) -> Iterator[list[tuple[int, bool]]]:
    """For each token that came, as far as the tree goes: the rows proposed for its place, and whether they were it."""
    parent = 0
    for token in emitted:
        rows = range(parent + 1, min(parent + 2, len(tree)) if tree.is_chain else len(tree))
        judged = [(row, tree.tokens[row] == token) for row in rows if tree.parents[row] == parent]
        if not judged:
            return
        yield judged
        parent = max((row for row, hit in judged if hit), default=-1)
        if parent < 0:
            return


def _log_odds(rate: float) -> float:
    rate = min(max(rate, _LEAST_RATE), MOST_RATE)
    return math.log(rate / (1.0 - rate))


def _probability(log_odds: float) -> float:
    return min(1.0 / (1.0 + math.exp(-log_odds)) if log_odds > -20 else 0.0, MOST_RATE)


def _add(table: dict[Any, list[float]], key: Hashable, hit: bool, most: float) -> None:
    """Count a case; of ``most`` cases the older ones count half."""
    counts = table.setdefault(key, [0.0, 0.0])
    if counts[1] >= most:
        counts[0] *= 0.5
        counts[1] *= 0.5
    counts[0] += hit
    counts[1] += 1.0


def kind_of(draft: Draft, row: int) -> Hashable:
    """Class of one row of a draft; the depth where the drafter gave none, or where the tokens were drawn at random."""
    return draft.classes[row - 1] if draft.classes and draft.probs is None else draft.tree.depths[row]
