"""Texts that have ended and whose context is still in the cache, for later prompts that begin alike.

A prompt reuses the longest prefix of token ids that it shares with a kept or a running text. A kept text occupies a row
that nobody uses, and is dropped, oldest first, when a new text needs a row and no other is free. Texts of one ``scope``
are never compared with those of another, because a sender could tell from the time to its first token what others have
sent.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

LEAST = 32
"""Tokens that two texts must share for it to be worth a copy."""


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two texts have in common from their beginning."""
    most = min(len(one), len(other))
    if tuple(one[:LEAST]) != tuple(other[:LEAST]):  # most texts; what they share is too short to matter
        most = min(most, LEAST - 1)
    low = 0
    while low < most:  # the prefix is equal up to ``low``, and not beyond ``most``
        middle = (low + most + 1) // 2
        if tuple(one[low:middle]) == tuple(other[low:middle]):
            low = middle
        else:
            most = middle - 1
    return low


class KeptTexts:
    """Which row holds the context of which text."""

    def __init__(self) -> None:
        self._texts: dict[int, tuple[tuple[int, ...], str]] = {}  # by row, the oldest first

    def __contains__(self, row: int) -> bool:
        return row in self._texts

    def __len__(self) -> int:
        return len(self._texts)

    def add(self, row: int, tokens: Sequence[int], scope: str) -> None:
        """Row ``row`` holds the context of exactly these tokens."""
        self._texts.pop(row, None)
        self._texts[row] = (tuple(tokens), scope)

    def drop(self, row: int) -> None:
        """The row is used for something else."""
        self._texts.pop(row, None)

    def text(self, row: int) -> tuple[tuple[int, ...], str]:
        """Tokens and scope of a row; KeyError if it holds none."""
        return self._texts[row]

    def best(self, prompt: Sequence[int], scope: str) -> tuple[int, int]:
        """The row that shares most tokens with ``prompt``, and how many; (0, 0) if none shares any."""
        best = (0, 0)
        for row, (tokens, own) in self._texts.items():
            shared = common_prefix(prompt, tokens) if own == scope else 0
            if shared > best[1]:
                best = (row, shared)
        if best[1]:  # it is of use again: the newest from now on
            self._texts[best[0]] = self._texts.pop(best[0])
        return best

    def oldest(self, rows: Iterable[int]) -> int | None:
        """Of ``rows`` the one whose text was of no use for longest; None if none of them holds one."""
        wanted = set(rows)
        return next((row for row in self._texts if row in wanted), None)
