"""Turns tokens into text as they arrive: never half a character, never the beginning of a stop string.

The pieces add up to what decoding all tokens at once gives, whatever the tokens are. A tokenizer with byte fallback
(Llama 2, Mistral, Gemma) decodes a run of byte tokens as a whole: one invalid byte turns every byte of its run into
U+FFFD, those of complete characters before it included. So the text of a run is given out once a token of another kind
ends it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from tokenizers import Tokenizer

_CONTEXT = 8  # prompt tokens that set the scene for the first one: some tokenizers drop a leading space without
_MOST_HELD = 256  # tokens that may wait for the end of a byte run or of a character; no real text needs as many
_BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")
_REPLACEMENT = "\ufffd"


class TextStream:
    """Text of one growing sequence. No token id raises an error: one that decodes to nothing gives no text.

    Args:
        tokenizer: decodes; special tokens give no text.
        prompt: the tokens before the first one.
        stops: strings that end the text; they are not part of it.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stops: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stops = tuple(stops)
        self._good = self._last_good_place(prompt)  # tokens whose text no later token changes
        self._before = self._decode(self._good)
        self._pending: list[int] = []  # tokens after them, whose text has not been given out
        self._in_run = False  # byte tokens are among them
        self._held = ""  # decoded, not yet given out: it may be the beginning of a stop string
        self.stopped = False

    def push(self, token: int) -> str:
        """Text that became certain with ``token``; sets ``stopped`` when a stop string is complete."""
        self._pending.append(token)
        full = len(self._pending) >= _MOST_HELD
        if self._continues_run(token) and not full:
            return ""
        text = self._decode(self._good + self._pending)
        if not full and (len(text) <= len(self._before) or text.endswith(_REPLACEMENT)):
            return ""
        piece = self._new_text(text)
        if piece:
            self._good = self._pending
            self._before = self._decode(self._good)
        self._pending, self._in_run = [], False
        return self._release(piece) if self._stops else piece

    def finish(self) -> str:
        """The rest of the text once no token follows; an unfinished character becomes U+FFFD."""
        if self.stopped:
            return ""
        rest = self._new_text(self._decode(self._good + self._pending))
        self._pending = []
        if not self._stops:
            return rest
        out = self._release(rest)
        if not self.stopped:
            out, self._held = out + self._held, ""
        return out

    def _decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True)

    def _new_text(self, text: str) -> str:
        """What ``text``, of the good tokens and the pending ones, adds to that of the good ones.

        A run of bytes longer than is held may change text that was given out; the pending ones then stand alone.
        """
        return text[len(self._before) :] if text.startswith(self._before) else self._decode(self._pending)

    def _continues_run(self, token: int) -> bool:
        """Whether the run of byte tokens goes on: what is left out of the text does not end it."""
        if self._is_byte(token):
            self._in_run = True
        return self._in_run and (self._is_byte(token) or self._is_left_out(token))

    def _is_byte(self, token: int) -> bool:
        piece = self._tokenizer.id_to_token(token)
        return piece is not None and _BYTE_TOKEN.fullmatch(piece) is not None

    def _is_left_out(self, token: int) -> bool:
        """Whether a token is special or has no text at all, such as the padding rows of a vocabulary."""
        if self._decode([token]):
            return False
        return self._tokenizer.id_to_token(token) is None or self._tokenizer.decode([token], False) != ""

    def _last_good_place(self, prompt: Sequence[int]) -> list[int]:
        """The prompt's last tokens before an open run of bytes or an unfinished character."""
        end = len(prompt)
        while end and (self._is_byte(prompt[end - 1]) or self._is_left_out(prompt[end - 1])):
            end -= 1
        while end and self._decode(prompt[max(0, end - _CONTEXT) : end]).endswith(_REPLACEMENT):
            end -= 1
        return list(prompt[max(0, end - _CONTEXT) : end])

    def _release(self, piece: str) -> str:
        text = self._held + piece
        found = [place for place in (text.find(stop) for stop in self._stops) if place >= 0]
        if found:
            self.stopped = True
            self._held = ""
            return text[: min(found)]
        keep = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a proper beginning of ``stop``."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
