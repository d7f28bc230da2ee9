"""One chunk for each token of a round, for clients that need an even cadence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tokenizers import Tokenizer

from dspark_runtime.decoding.request import Request
from dspark_runtime.decoding.sequence import Chunk
from dspark_runtime.text.stream import TextStream


class Splitter:
    """Splits the chunks of one text; all of them have to pass through."""

    def __init__(self, tokenizer: Tokenizer, request: Request) -> None:
        self._texts = TextStream(tokenizer, request.prompt, request.stops)

    def split(self, chunk: Chunk) -> Sequence[Chunk]:
        """Chunks of one token each, whose texts add up to that of ``chunk``; the last one has its end."""
        pieces = [self._texts.push(token) for token in chunk.tokens]
        if len(pieces) < 2:
            return [chunk]
        parts, rest, last = list[Chunk](), chunk.text, len(pieces) - 1
        for place, (token, piece) in enumerate(zip(chunk.tokens, pieces, strict=True)):
            text = rest if place == last else rest[: len(piece)]
            rest = rest[len(text) :]
            part = replace(
                chunk,
                text=text,
                tokens=[token],
                finish_reason=chunk.finish_reason if place == last else None,
                drafters=chunk.drafters[place : place + 1],
                logprobs=chunk.logprobs[place : place + 1],
            )
            parts.append(part)
        return parts
