"""Drafts from phrases: of the request's own text, of requests before it, and of what the target said at build time.

No training and no passes of its own: a proposal takes microseconds, see :mod:`dspark_runtime.phrases.tables`. The
target itself says what to remember: a committed token counts half for the token that was likeliest there, and half over
the likeliest ones by their probability.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from dspark_runtime.drafters.base import Draft, Drafter, DraftRequest, TopTokens
from dspark_runtime.phrases.store import PhraseStore
from dspark_runtime.phrases.tables import LONGEST, UNIT, Follower, GrowingPhrases, Grown, Shape
from dspark_runtime.speculation.tree import TokenTree

LEAST_CHANCE = 0.004


@dataclass(slots=True)
class _Text:
    """One running sequence: its committed tokens, what was learned of each generated one, and the last proposal."""

    tokens: list[int]
    phrases: GrowingPhrases
    start: int
    scope: str = ""
    learned: list[Sequence[Follower]] = field(default_factory=list)
    top: list[Sequence[Follower]] = field(default_factory=list)
    grown: Grown | None = None


class StoreDrafter(Drafter):
    """See the module's text.

    Args:
        store: of the opened bundle.
        depth: most levels of a tree.
        width: most tokens that may follow one.
    """

    name = "store"
    wants_top = True

    def __init__(self, store: PhraseStore, depth: int = 16, width: int = 8) -> None:
        self._store, self._depth, self._width = store, depth, width
        self._texts: dict[int, _Text] = {}

    def begin(self, request: int, prompt: Sequence[int]) -> None:
        """Learn the prompt's phrases."""
        text = self._texts[request] = _Text(list(prompt), self._store.text(), len(prompt))
        text.phrases.add_text(prompt)

    def observe_top(self, request: int, rows: Sequence[TopTokens]) -> None:
        """What the target held likely in the rows that :meth:`commit` gives the tokens of."""
        self._texts[request].top = [followers(row) for row in rows]

    def commit(self, request: int, tokens: Sequence[int]) -> None:
        """Learn what came, and how well it was foreseen."""
        text = self._texts[request]
        if text.grown is not None:
            self._store.learn(_judged(text.grown, tokens))
            text.grown = None
        for place, token in enumerate(tokens):
            weights = text.top[place] if place < len(text.top) else ((token, UNIT),)
            text.phrases.add(text.tokens[-LONGEST:], weights)
            text.learned.append(weights)
            text.tokens.append(token)
        text.top = []

    def end(self, request: int) -> None:
        """Leave the text to the requests after it."""
        text = self._texts.pop(request, None)
        if text is not None:
            self._store.remember(text.scope, text.tokens, text.start, text.learned)

    def prior(self, kind: Hashable) -> float:
        """What the class was worth in all requests."""
        return self._store.rate(kind) if isinstance(kind, int) else 0.3

    def draft(self, request: DraftRequest) -> Draft | None:
        """The likeliest tree, as far as its tokens may pay."""
        text = self._texts[request.request]
        text.scope = request.scope
        shape = Shape(request.limit, self._depth, self._width, max(LEAST_CHANCE, request.floor))
        grown = self._store.grow(request.scope, text.phrases, request.tokens[-LONGEST:], shape)
        text.grown = grown
        if not grown.tokens:
            return None
        parents = [-1, *(parent + 1 for parent in grown.parents)]
        return Draft(TokenTree([request.tokens[-1], *grown.tokens], parents), grown.classes)


def followers(top: TopTokens) -> list[Follower]:
    """Weights of the tokens that were likely in one row, :data:`UNIT` together, rounding apart."""
    tokens, chances = top
    best = max(range(len(tokens)), key=chances.__getitem__)
    weights = [round(UNIT / 2 * (chance + (place == best))) for place, chance in enumerate(chances)]
    return [(token, weight) for token, weight in zip(tokens, weights, strict=True) if weight]


def _judged(grown: Grown, tokens: Sequence[int]) -> list[tuple[int, bool]]:
    """Class of every proposed token that followed committed ones, and whether it came."""
    judged: list[tuple[int, bool]] = []
    row = -1
    for token in tokens:
        following = None
        for node, parent in enumerate(grown.parents):
            if parent == row:
                hit = grown.tokens[node] == token
                judged.append((grown.classes[node], hit))
                if hit:
                    following = node
        if following is None:
            break
        row = following
    return judged
