"""Tokens to text as they come: never half a character, never the beginning of a stop string.

Decoding itself is the tokenizer library's ``DecodeStream``; this module adds stop strings and the end of a text.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from dspark_runtime.errors import BundleError

_CONTEXT = 8  # prompt tokens that set the scene for the first one: some tokenizers drop a leading space without


class TextStream:
    """Text of one growing sequence.

    Args:
        tokenizer: decodes; special tokens give no text.
        prompt: the tokens before the first one.
        stops: strings that end the text; they are not part of it.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stops: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._context = list(prompt[-_CONTEXT:])
        self._decoder = DecodeStream(ids=self._context, skip_special_tokens=True)
        self._stops = tuple(stops)
        self._tokens: list[int] = []
        self._pieces: list[str] = []  # decoded so far
        self._held = ""  # decoded, not yet given out: it may be the beginning of a stop string
        self.stopped = False

    def push(self, token: int) -> str:
        """Text that became certain with ``token``; sets ``stopped`` when a stop string is complete."""
        self._tokens.append(token)
        try:
            piece = self._decoder.step(self._tokenizer, token)
        except Exception as error:
            raise BundleError(f"the tokenizer cannot decode token {token}: {error}") from error
        if not piece:
            return ""
        self._pieces.append(piece)
        return self._release(piece) if self._stops else piece

    def finish(self) -> str:
        """The rest of the text once no token follows; an unfinished character becomes U+FFFD."""
        if self.stopped:
            return ""
        done = "".join(self._pieces)
        before = self._tokenizer.decode(self._context, skip_special_tokens=True)
        full = self._tokenizer.decode(self._context + self._tokens, skip_special_tokens=True)
        rest = full[len(before) + len(done) :]
        if not self._stops:
            return rest
        out = self._release(rest)
        if not self.stopped:
            out, self._held = out + self._held, ""
        return out

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
