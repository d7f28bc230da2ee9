"""Special tokens that users typed: marked before a chat template is rendered, encoded as plain text afterwards.

The marks are private-use characters around the whole token, so that a template still finds it with ``in`` or
``split``. If a template separates a token from one of its marks, the other still identifies it; without both, it is
lost.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

Encode = Callable[[str], list[int]]

_BEGIN, _END = "\ue0d5", "\ue0d7"
_MARKS = str.maketrans("", "", _BEGIN + _END)
_ESCAPES = {f"\\u{ord(mark):04x}": mark for mark in (_BEGIN, _END)}  # as JSON with ensure_ascii writes them


class TypedTokens:
    """Marks and finds the special tokens ``texts`` of a tokenizer."""

    def __init__(self, texts: Iterable[str]) -> None:
        longest_first = sorted({text for text in texts if text}, key=len, reverse=True)
        either = "|".join(map(re.escape, longest_first)) or "(?!)"
        self._token = re.compile(either)
        begin, end = (f"(?:{mark}|{re.escape(escape)})" for escape, mark in zip(_ESCAPES, (_BEGIN, _END), strict=True))
        self._typed = re.compile(f"{begin}({either}){end}?|({either}){end}")
        self._marks = re.compile(f"{begin}|{end}")

    def marked(self, value: Any) -> Any:
        """``value`` with every special token in its texts marked, at any depth; keys are left as they are."""
        if isinstance(value, str):
            return self._token.sub(f"{_BEGIN}\\g<0>{_END}", value.translate(_MARKS))
        if isinstance(value, Mapping):
            return {key: self.marked(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [self.marked(inner) for inner in value]
        return value

    def encode(self, text: str, meant: Encode, plain: Encode) -> list[int]:
        """Ids of a rendered template: special tokens that were typed as ``plain`` text, all others as ``meant``."""
        ids: list[int] = []
        for place, piece in enumerate(self._typed.split(text)):  # text, then the two ways to be marked, and so on
            for part in self._marks.split(piece or ""):  # what a lost mark stood between does not join to a token
                if part:
                    encode = meant if place % 3 == 0 else plain
                    ids += _behind(part, encode) if ids else encode(part)
        return ids


def _behind(text: str, encode: Encode) -> list[int]:
    """Ids of a text that follows another: some tokenizers put a space before what they take for a beginning."""
    line = encode("\n")
    ids = encode("\n" + text)
    return ids[len(line) :] if ids[: len(line)] == line else encode(text)
