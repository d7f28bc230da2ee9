"""Phrases: which tokens followed which contexts, and the tree of what is likely to come next.

A *context* is the last 1 to 4 (or 6) tokens of a text. For each one a :class:`PhraseTable` has weights of the tokens
that followed, in units of 1/256 of a token. Three tables are looked up together, each for other evidence:

======= ==== ================================================================ ======
source  name what it has seen                                                 orders
======= ==== ================================================================ ======
0       C    the corpus of the bundle: what the target said at build time     1 to 4
1       H    the history: texts of earlier requests                           1 to 4
2       D    the text of the request itself                                   1 to 6
======= ==== ================================================================ ======

The probability of a token is interpolated, from the shortest context to the longest, C before H before D:
``p = (1 - l) p + l * weight / total`` with ``l = total / (total + d)``; ``DISCOUNTS`` has the ``d``. A token's *class*
is the strongest evidence that speaks for it (source and order) and the bucket of its probability. What a class is worth
is learned while running; the tree grows best first by the product of these rates.

This module is the plain form of :mod:`dspark_runtime.phrases.compiled`, which computes the same numbers bit for bit.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from dspark_runtime.errors import DamagedBundle

UNIT = 256
"""Weight of one token that followed once."""
CORPUS, HISTORY, TEXT = 0, 1, 2
ORDERS = (4, 4, 6)
"""Longest context, by source."""
MOST_FOLLOWERS = 16
"""Tokens kept per context; where one more comes, the one of least weight goes."""
DISCOUNTS = (
    (0.0, 3.0, 3.0, 3.0, 3.0),
    (0.0, 2.0, 1.0, 1.0, 1.0),
    (0.0, 2.0, 0.8, 0.4, 0.2, 0.1, 0.1),
)
"""``d`` of a source and an order, in tokens."""
EDGES = (0.01, 0.02, 0.04, 0.07, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97)
CENTRES = (0.005, 0.015, 0.03, 0.055, 0.085, 0.125, 0.175, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.935, 0.985)
BUCKETS = len(CENTRES)
GROUPS = 4
"""Orders that classes tell apart; longer ones are like the longest of these."""
CLASSES = 3 * GROUPS * BUCKETS
MOST_RATE = 0.995
LONGEST = max(ORDERS)

_MASK = 2**64 - 1
_FACTOR = 0x9E3779B97F4A7C15

Follower = tuple[int, int]
"""Token and weight."""


def context_keys(tokens: Sequence[int], orders: int) -> list[int]:
    """64-bit keys of the contexts that end with the last of ``tokens``, the shortest first."""
    keys, key = [], 0
    for token in reversed(tokens[-orders:]):
        key = (key ^ (token + 1)) * _FACTOR & _MASK
        key ^= key >> 32
        keys.append(key)
    return keys


@dataclass(frozen=True, slots=True)
class Shape:
    """How a tree may grow: most ``nodes``, ``depth`` and children per node (``width``); a node that is reached with a
    chance below ``least`` is left out."""

    nodes: int
    depth: int = 16
    width: int = 8
    least: float = 0.004


@dataclass(frozen=True, slots=True)
class Grown:
    """A tree behind the anchor: token, parent (-1 for the anchor) and class of each node, parents first."""

    tokens: list[int]
    parents: list[int]
    classes: list[int]


class Phrases(Protocol):
    """Weights of following tokens by context."""

    def find(self, key: int) -> tuple[int, Sequence[Follower]] | None:
        """Total weight and followers of a context; None if it was never seen."""


class GrowingPhrases(Phrases, Protocol):
    """Phrases that learn."""

    def add(self, tokens: Sequence[int], followers: Sequence[Follower]) -> None:
        """Count ``followers`` for every context that ends with the last of ``tokens``."""

    def add_text(self, tokens: Sequence[int]) -> None:
        """Count each token of a text but the first, with weight 1."""

    def packed(self) -> PackedPhrases:
        """A copy of everything that is known."""

    def load(self, packed: PackedPhrases) -> None:
        """Add what ``packed`` knows, as far as there is room; contexts that are known already are left as they are."""

    def __len__(self) -> int:
        """Contexts known."""


@dataclass(frozen=True)
class PackedPhrases:
    """Phrases as arrays, which can be stored: contexts sorted by key, each with its followers side by side.

    ``keys`` uint64 [contexts], ``starts`` uint32 [contexts + 1] (first follower), ``totals`` uint32 [contexts] (weight
    of all followers there ever were), ``tokens`` uint32 [followers], ``weights`` uint16 [followers].
    """

    keys: npt.NDArray[np.uint64]
    starts: npt.NDArray[np.uint32]
    totals: npt.NDArray[np.uint32]
    tokens: npt.NDArray[np.uint32]
    weights: npt.NDArray[np.uint16]

    FIELDS = (
        ("keys", np.uint64),
        ("starts", np.uint32),
        ("totals", np.uint32),
        ("tokens", np.uint32),
        ("weights", np.uint16),
    )

    def __len__(self) -> int:
        return len(self.keys)

    @classmethod
    def of(cls, contexts: Iterable[tuple[int, int, Sequence[Follower]]]) -> PackedPhrases:
        """Pack (key, total weight, followers) of each context."""
        rows = sorted(contexts)
        keys = np.array([row[0] for row in rows], np.uint64)
        starts = np.zeros(len(rows) + 1, np.uint32)
        np.cumsum([len(row[2]) for row in rows], out=starts[1:])
        pairs = np.array([pair for row in rows for pair in row[2]], np.int64).reshape(-1, 2)
        totals = np.array([row[1] for row in rows], np.int64)
        return cls.narrowed(keys, starts, totals, pairs[:, 0], pairs[:, 1])

    @classmethod
    def narrowed(
        cls,
        keys: npt.NDArray[np.uint64],
        starts: npt.NDArray[np.uint32],
        totals: npt.NDArray[np.int64],
        tokens: npt.NDArray[np.int64],
        weights: npt.NDArray[np.int64],
    ) -> PackedPhrases:
        """Pack arrays with wide numbers; a context with too large a total is scaled down as a whole."""
        over = np.maximum(-(-totals // 65535), 1)
        each = np.repeat(over, starts[1:].astype(np.int64) - starts[:-1])
        return cls(
            keys,
            starts,
            (totals // over).astype(np.uint32),
            tokens.astype(np.uint32),
            np.maximum(weights // each, 1).astype(np.uint16),
        )

    def checked(self, vocab_size: int, where: str) -> PackedPhrases:
        """Itself; DamagedBundle, naming ``where``, if the arrays contradict each other or name unknown tokens."""
        shapes = all(getattr(self, name).ndim == 1 and getattr(self, name).dtype == kind for name, kind in self.FIELDS)
        if not (
            shapes
            and len(self.starts) == len(self.keys) + 1 == len(self.totals) + 1
            and len(self.tokens) == len(self.weights) == int(self.starts[-1])
            and self.starts[0] == 0
            and bool((self.starts[1:] >= self.starts[:-1]).all())
            and bool((self.keys[1:] > self.keys[:-1]).all())
            and bool((self.tokens < vocab_size).all())
        ):
            raise DamagedBundle(f"{where} is no store of phrases for a vocabulary of {vocab_size}; write it again")
        return self

    def pruned(self, least_share: float = 0.02, most_followers: int = MOST_FOLLOWERS) -> PackedPhrases:
        """Without followers of a smaller share of their context's weight, and with the heaviest of the others only."""
        counts = self.starts[1:].astype(np.int64) - self.starts[:-1]
        owner = np.repeat(np.arange(len(self)), counts)
        weights = self.weights.astype(np.int64)
        order = np.lexsort((np.arange(len(weights)), -weights, owner))
        rank = np.arange(len(weights)) - self.starts.astype(np.int64)[owner]  # within the context, once sorted
        kept = order[(rank < most_followers) & (weights[order] >= least_share * self.totals[owner])]
        kept.sort()
        present = np.bincount(owner[kept], minlength=len(self))
        some = present > 0
        starts = np.zeros(int(some.sum()) + 1, np.uint32)
        np.cumsum(present[some], out=starts[1:])
        return PackedPhrases(self.keys[some], starts, self.totals[some], self.tokens[kept], self.weights[kept])

    def context(self, place: int) -> tuple[int, list[Follower]]:
        """Total weight and followers of the context at ``place``."""
        first, last = int(self.starts[place]), int(self.starts[place + 1])
        tokens, weights = self.tokens[first:last].tolist(), self.weights[first:last].tolist()
        return int(self.totals[place]), list(zip(tokens, weights, strict=True))


class StoredPhrases:
    """:class:`PackedPhrases` for lookups in plain Python."""

    def __init__(self, packed: PackedPhrases) -> None:
        self._packed = packed
        self._keys: list[int] = packed.keys.tolist()

    def find(self, key: int) -> tuple[int, Sequence[Follower]] | None:
        """Total weight and followers of a context; None if it was never seen."""
        place = bisect_left(self._keys, key)
        return self._packed.context(place) if place < len(self._keys) and self._keys[place] == key else None


class PhraseTable:
    """Phrases that learn, in plain Python.

    Args:
        orders: longest context.
        most_contexts: when there are more, those that were added to longest ago go, half of all at once; None for any
            number.
    """

    def __init__(self, orders: int, most_contexts: int | None = None) -> None:
        self._orders, self._most = orders, most_contexts
        self._clock = 0
        self._contexts: dict[int, list[int]] = {}  # total, clock, then token and weight in turns

    def __len__(self) -> int:
        return len(self._contexts)

    def find(self, key: int) -> tuple[int, Sequence[Follower]] | None:
        """Total weight and followers of a context; None if it was never seen."""
        known = self._contexts.get(key)
        return None if known is None else (known[0], list(zip(known[2::2], known[3::2], strict=True)))

    def add(self, tokens: Sequence[int], followers: Sequence[Follower]) -> None:
        """Count ``followers`` for every context that ends with the last of ``tokens``."""
        self._clock += 1
        for key in context_keys(tokens, self._orders):
            known = self._contexts.get(key)
            if known is None:
                known = self._contexts[key] = [0, 0]
            known[1] = self._clock
            for token, weight in followers:
                known[0] += weight
                _count(known, token, weight)
        self._forget()

    def add_text(self, tokens: Sequence[int]) -> None:
        """Count each token of a text but the first, with weight 1."""
        for place in range(1, len(tokens)):
            self.add(tokens[max(0, place - self._orders) : place], ((tokens[place], UNIT),))

    def packed(self) -> PackedPhrases:
        """A copy of everything that is known."""
        return PackedPhrases.of(
            (key, known[0], list(zip(known[2::2], known[3::2], strict=True))) for key, known in self._contexts.items()
        )

    def load(self, packed: PackedPhrases) -> None:
        """Add what ``packed`` knows, as far as there is room; contexts that are known already are left as they are."""
        for place, key in enumerate(packed.keys.tolist()):
            if self._most is not None and len(self._contexts) >= self._most:
                return
            if key not in self._contexts:
                total, followers = packed.context(place)
                self._contexts[key] = [total, self._clock, *(number for pair in followers for number in pair)]

    def _forget(self) -> None:
        if self._most is None or len(self._contexts) <= self._most:
            return
        clocks = sorted(known[1] for known in self._contexts.values())
        least = min(clocks[len(clocks) // 2], self._clock - 1)
        self._contexts = {key: known for key, known in self._contexts.items() if known[1] > least}
        if len(self._contexts) > self._most:  # all of one age
            self._contexts.clear()


def _count(known: list[int], token: int, weight: int) -> None:
    weakest = 2
    for place in range(2, len(known), 2):
        if known[place] == token:
            known[place + 1] += weight
            return
        if known[place + 1] < known[weakest + 1]:
            weakest = place
    if len(known) < 2 + 2 * MOST_FOLLOWERS:
        known += (token, weight)
    else:
        known[weakest : weakest + 2] = (token, weight)


def grow(sources: Sequence[Phrases | None], rates: Sequence[float], context: Sequence[int], shape: Shape) -> Grown:
    """The likeliest tree behind ``context``, whose last token is the anchor.

    Args:
        sources: C, H and D; None for one there is not.
        rates: [CLASSES] chance that a token of a class is accepted, given that its parent is.
        context: at least the last :data:`LONGEST` tokens of the text, or all of them.
        shape: how far it may grow.
    """
    grown = Grown([], [], [])
    waiting: list[tuple[float, int, int, int, int, int, list[int]]] = []
    numbers = 0

    def expand(row: int, ends: list[int], chance: float, depth: int) -> None:
        nonlocal numbers
        if depth >= shape.depth:
            return
        for token, kind in children(sources, ends, shape.width):
            reached = chance * min(rates[kind], MOST_RATE)
            if reached >= shape.least:
                numbers += 1
                heapq.heappush(waiting, (-reached, numbers, row, token, kind, depth + 1, ends))

    expand(-1, list(context[-LONGEST:]), 1.0, 0)
    while waiting and len(grown.tokens) < shape.nodes:
        chance, _, row, token, kind, depth, ends = heapq.heappop(waiting)
        grown.tokens.append(token)
        grown.parents.append(row)
        grown.classes.append(kind)
        expand(len(grown.tokens) - 1, [*ends, token][-LONGEST:], -chance, depth)
    return grown


def children(sources: Sequence[Phrases | None], ends: Sequence[int], width: int) -> list[tuple[int, int]]:
    """(token, class) of the likeliest tokens behind a context, the likeliest first."""
    tokens: dict[int, list[float]] = {}  # token -> probability, source, order
    for order, key in enumerate(context_keys(ends, LONGEST), 1):
        for source, phrases in enumerate(sources):
            if phrases is None or order > ORDERS[source]:
                continue
            found = phrases.find(key)
            if found is None or found[0] == 0:
                continue
            total, followers = found
            share = total / (total + DISCOUNTS[source][order] * UNIT)
            for entry in tokens.values():
                entry[0] *= 1.0 - share
            each = share / total
            for token, weight in followers:
                entry = tokens.setdefault(token, [0.0, source, order])
                entry[0] += each * weight
                if source != CORPUS or entry[1] == CORPUS:  # what the corpus knows is the weakest evidence
                    entry[1], entry[2] = source, order
    best = sorted(tokens.items(), key=lambda item: -item[1][0])[:width]
    return [(token, class_of(int(source), int(order), chance)) for token, (chance, source, order) in best]


def class_of(source: int, order: int, chance: float) -> int:
    """Number of a class, see the module's text."""
    return (source * GROUPS + min(order, GROUPS) - 1) * BUCKETS + bisect_right(EDGES, chance)
