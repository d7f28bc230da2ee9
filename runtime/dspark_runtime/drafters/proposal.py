"""Merges the trees of several drafters into one trie, so that a shared prefix is verified once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from dspark_runtime.drafters.base import Draft, Drafter
from dspark_runtime.speculation.tree import MAX_ROWS, TokenTree, merge


@dataclass(slots=True)
class Part:
    """One drafter's share of a proposal; ``places[r]`` is the row of the merged tree that holds its row r."""

    drafter: Drafter
    draft: Draft
    places: Sequence[int]


@dataclass(slots=True)
class Proposal:
    """What all drafters together propose for one sequence.

    Where they are several, and once the schedule has looked, ``said`` holds what each of them says of each row of the
    merged tree, and ``surest`` the probability of acceptance that the surest one gives
    (:mod:`dspark_runtime.decoding.acceptance`).
    """

    request: int
    tree: TokenTree
    parts: list[Part] = field(default_factory=list)
    said: list[list[int]] = field(default_factory=list)
    surest: list[float] = field(default_factory=list)
    _owners: list[list[tuple[Drafter, Draft, int]]] | None = None

    @classmethod
    def empty(cls, request: int, anchor: int) -> Proposal:
        """Nothing proposed: only the anchor."""
        return cls(request, TokenTree.chain(anchor, ()))

    def add(self, drafter: Drafter, draft: Draft) -> None:
        """Merge one more draft. Tokens drawn at random go with nothing else: such a draft replaces what there is."""
        if draft.probs is not None or not self.parts:
            self.tree = draft.tree
            self.parts = [Part(drafter, draft, range(len(draft.tree)))]
        elif self.parts[0].draft.probs is None and len(self.tree) + len(draft.tree) - 1 <= MAX_ROWS:
            merged, (mine, theirs) = merge([self.tree, draft.tree])
            for part in self.parts:
                part.places = [mine[row] for row in part.places]
            self.tree = merged
            self.parts.append(Part(drafter, draft, theirs))
        self._owners = None
        self.said, self.surest = [], []

    def sources(self, row: int) -> Iterator[tuple[Drafter, Draft, int]]:
        """Every (drafter, draft, row of that draft) that proposed ``row`` of the merged tree."""
        if len(self.parts) == 1:
            part = self.parts[0]
            yield part.drafter, part.draft, row
            return
        if self._owners is None:
            self._owners = [[] for _ in range(len(self.tree))]
            for part in self.parts:
                for own, place in enumerate(part.places):
                    self._owners[place].append((part.drafter, part.draft, own))
        yield from self._owners[row]

    def credit(self, part: Part, verified: TokenTree, accepted: Sequence[int]) -> tuple[int, int]:
        """How many rows of ``verified``, a cut of this proposal, one part proposed, and how many accepted tokens."""
        if len(self.parts) == 1:
            return len(verified) - 1, len(accepted)
        own, row, hits = part.draft.tree, 0, 0
        for token in accepted:
            row = own.child(row, token)
            if row < 0:
                break
            hits += 1
        drafted, match = 0, {0: 0}
        for place in range(1, len(verified)):
            above = match.get(verified.parents[place], -1)
            here = own.child(above, verified.tokens[place]) if above >= 0 else -1
            if here >= 0:
                match[place] = here
                drafted += 1
        return drafted, hits

    def main_chain(self, part: Part, verified: TokenTree, accepted: Sequence[int]) -> tuple[int, int]:
        """Of one part's most likely tokens: how many in a row ``verified`` holds, and how many of them were
        accepted."""
        own, row, place, depth, hits = part.draft.tree, 0, 0, 0, 0
        right = True
        while True:
            row = own.first_child(row)
            place = verified.child(place, own.tokens[row]) if row >= 0 else -1
            if place < 0:
                return depth, hits
            right = right and depth < len(accepted) and accepted[depth] == own.tokens[row]
            hits += right
            depth += 1

    @property
    def sampled(self) -> Draft | None:
        """The draft whose tokens were drawn at random, if that is what is proposed."""
        return self.parts[0].draft if self.parts and self.parts[0].draft.probs is not None else None
