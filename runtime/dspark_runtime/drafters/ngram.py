"""Prompt lookup: find an earlier occurrence of the end of the text and propose what followed it.

An index of all n-grams (n = 1 to 4) of the committed text grows by a constant amount of work per token. A proposal
starts from the occurrence with the longest match to the end of the text, the latest one among equals; when the
occurrences disagree about the next token, the runner-up is offered as a second branch. A continuation that reaches the
end of the text repeats itself from there, which drafts periodic text of any length.

Class of a row: (length of the match, whether the occurrences agree, place). They separate proposals
that are nearly always right from those that are mostly wrong, see :mod:`dspark_runtime.decoding.schedule`.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from dspark_runtime.drafters.base import Draft, Drafter, DraftRequest
from dspark_runtime.speculation.tree import TokenTree

_BITS = 20  # per token id in a packed n-gram
_LONGEST = 32  # agreement is measured up to here
_LOOKED_AT = 8  # occurrences compared per proposal
_BRANCH = 4  # tokens of the second branch

# Agreement length -> bucket, and the acceptance expected of a bucket before anything was seen.
_BUCKETS = (0, 1, 2, 3, 4, 5, 5, 6, 6, 6, *(7,) * 6, *(8,) * 17)
_PRIOR = (0.1, 0.2, 0.4, 0.5, 0.6, 0.7, 0.75, 0.85, 0.92)


class NgramIndex:
    """Occurrences of the n-grams of one growing text."""

    def __init__(self, longest: int = 4) -> None:
        self.tokens: list[int] = []
        self._masks = [(1 << (_BITS * n)) - 1 for n in range(1, longest + 1)]
        self._places: list[dict[int, list[int]]] = [{} for _ in self._masks]
        self._window = 0

    def extend(self, tokens: Sequence[int]) -> None:
        """Append to the text. An n-gram is entered once the token after it is known."""
        window, all_bits = self._window, self._masks[-1]
        place = len(self.tokens) - 1
        for token in tokens:
            if place >= 0:
                for n, (mask, places) in enumerate(zip(self._masks, self._places, strict=True)):
                    if place < n:
                        break
                    key = window & mask
                    known = places.get(key)
                    if known is None:
                        places[key] = [place]
                    else:
                        known.append(place)
            window = ((window << _BITS) | token) & all_bits
            place += 1
        self.tokens.extend(tokens)
        self._window = window

    def matches(self) -> list[tuple[int, int]]:
        """(agreement, place) of the latest occurrences of the longest known suffix; best first."""
        window, count = self._window, len(self.tokens)
        for n in range(min(len(self._masks), count), 0, -1):
            places = self._places[n - 1].get(window & self._masks[n - 1])
            if places:
                found = [(self._agreement(place, n), place) for place in places[-_LOOKED_AT:]]
                found.sort(reverse=True)
                return found
        return []

    def _agreement(self, place: int, known: int) -> int:
        tokens = self.tokens
        end = len(tokens) - 1
        longest = min(_LONGEST, place + 1)
        while known < longest and tokens[place - known] == tokens[end - known]:
            known += 1
        return known

    def continuation(self, place: int, length: int) -> list[int]:
        """``length`` tokens after ``place``, going round where the text ends."""
        result = self.tokens[place + 1 : place + 1 + length]
        period = len(result)
        while len(result) < length:
            result.append(result[len(result) - period])
        return result


class NgramDrafter(Drafter):
    """See the module's text. ``longest`` is the longest n-gram indexed; ``shortest`` the shortest that may propose."""

    name = "ngram"

    def __init__(self, longest: int = 4, shortest: int = 1, branches: bool = True) -> None:
        self._longest, self._shortest, self._branches = longest, shortest, branches
        self._texts: dict[int, NgramIndex] = {}

    def begin(self, request: int, prompt: Sequence[int]) -> None:
        """Index the prompt."""
        index = self._texts[request] = NgramIndex(self._longest)
        index.extend(prompt)

    def commit(self, request: int, tokens: Sequence[int]) -> None:
        """Index new text."""
        self._texts[request].extend(tokens)

    def end(self, request: int) -> None:
        """Drop the index."""
        self._texts.pop(request, None)

    def prior(self, kind: Hashable) -> float:
        """By agreement; less where occurrences disagree."""
        if not (isinstance(kind, tuple) and len(kind) == 3):
            return 0.3
        bucket, mind, place = kind
        share = _PRIOR[bucket] * (0.35 if place == 2 else 1.0)
        return share * 0.7 if mind == 2 and place == 0 else share

    def draft(self, request: DraftRequest) -> Draft | None:
        """A chain, or a tree of two branches where occurrences disagree."""
        index = self._texts[request.request]
        found = index.matches()
        if not found or found[0][0] < self._shortest:
            return None
        agreement, place = found[0]
        tokens = index.tokens
        first = tokens[place + 1]
        rival = next(((a, p) for a, p in found if tokens[p + 1] != first), None)
        mind = 0 if len(found) == 1 else 1 if rival is None else 2
        chain = index.continuation(place, request.limit)
        last = len(_BUCKETS) - 1
        classes: list[Hashable] = [(_BUCKETS[min(agreement, last)], mind, 0)]
        classes += [(_BUCKETS[min(agreement + k, last)], mind, 1) for k in range(1, len(chain))]
        anchor = request.tokens[-1]
        if rival is None or not self._branches:
            return Draft(TokenTree.chain(anchor, chain), classes)
        second = index.continuation(rival[1], min(_BRANCH, request.limit))
        start = len(chain) + 1
        parents = [*range(-1, len(chain)), 0, *range(start, start + len(second) - 1)]
        classes.append((_BUCKETS[min(rival[0], last)], mind, 2))
        classes += [(_BUCKETS[min(rival[0] + k, last)], mind, 1) for k in range(1, len(second))]
        return Draft(TokenTree([anchor, *chain, *second], parents), classes)
