"""The state of one running sequence: its committed text and when it ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from tokenizers import Tokenizer

from dspark_runtime.arrays import FloatArray
from dspark_runtime.decoding.choice import TokenChoice, TokenLogprob
from dspark_runtime.decoding.request import Request
from dspark_runtime.decoding.statistics import Statistics
from dspark_runtime.speculation.sampling import Sampler
from dspark_runtime.speculation.verify import Verdict
from dspark_runtime.text.stream import TextStream

FinishReason = Literal["eos", "stop", "length", "cancelled", "dead_end"]
"""``dead_end``: the guide of the request allowed no further token, and its grammar is not complete."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """New text of sequence ``index`` (its place in the call). ``finish_reason`` is set on its last chunk only.

    ``drafters``: for each token the names of the drafters that proposed it; empty for a token of the target's own.
    ``logprobs``: for each token, where the request wants them.
    """

    index: int
    text: str
    tokens: list[int]
    finish_reason: FinishReason | None = None
    drafters: tuple[tuple[str, ...], ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Generation:
    """A finished text. ``tokens`` holds the token that ended it (EOS, or the one that completed a stop string);
    ``text`` does not. ``prompt_tokens`` counts the prompt; the context of the first ``cached_tokens`` of it was there
    already. ``logprobs``: for each token, where they were wanted."""

    text: str
    tokens: list[int]
    finish_reason: FinishReason
    prompt_tokens: int
    stats: Statistics = field(compare=False)
    cached_tokens: int = field(default=0, compare=False)
    logprobs: tuple[TokenLogprob, ...] = ()


class SequenceState:
    """One sequence between its request and its :class:`Generation`.

    ``tokens`` is the committed text, prompt included; its last token is the anchor, which no pass has seen yet. A block
    of accepted tokens is committed one token at a time, so that it ends where plain decoding would have ended. Tokens
    come before their text: the next pass needs the ones and not the other.
    """

    __slots__ = (
        "_finish", "_logprobs", "_ready", "_stops", "_stream", "_text", "cached", "choice", "index", "request", "row",
        "stats", "tokens",
    )  # fmt: skip

    def __init__(self, index: int, request: Request, tokenizer: Tokenizer | None) -> None:
        self.index = index
        self.request = request
        self.row = -1  # of the cache, once the prompt begins
        self.tokens = list(request.prompt)
        self.choice = TokenChoice(request)
        self.cached = 0  # tokens of the prompt whose context was there already
        self.stats = Statistics()
        self._stream = TextStream(tokenizer, request.prompt, request.stops) if tokenizer is not None else None
        self._stops = self._stream if request.stops else None
        self._ready = ""
        self._text: list[str] = []
        self._logprobs: list[TokenLogprob] = []
        self._finish: FinishReason | None = None

    @property
    def sampler(self) -> Sampler:
        """Draws its tokens."""
        return self.choice.sampler

    @property
    def reads_logits(self) -> bool:
        """Whether its tokens need the logits of every pass in host memory."""
        return self.choice.adjusted or self.request.params.logprobs is not None

    @property
    def emitted(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def remaining(self) -> int:
        """Tokens that may still be generated."""
        return self.request.max_new_tokens - self.emitted

    @property
    def finished(self) -> bool:
        """Whether the text has ended."""
        return self._finish is not None

    def append(self, tokens: Sequence[int]) -> list[int]:
        """Commit verified tokens up to the end of the text; those that were kept. :meth:`chunk` has their text.

        Only stop strings need the text to tell whether it ends, so that only for them it is made here.
        """
        kept: list[int] = []
        eos, guide_end, most = self.request.eos, self.choice.guide_end, self.request.max_new_tokens
        for emitted, token in enumerate(tokens, self.emitted + 1):
            kept.append(token)
            self.tokens.append(token)
            if token in eos:
                self._finish = "eos"
            elif self._stops is not None:
                self._ready += self._stops.push(token)
                if self._stops.stopped:
                    self._finish = "stop"
            if self._finish is None and emitted == guide_end:
                self._finish = "dead_end" if self.choice.dead_end else "stop"
            if self._finish is None and emitted == most:
                self._finish = "length"
            if self._finish is not None:
                break
        if self._stops is not None and self._finish is not None:
            self._ready += self._stops.finish()
            if self._stops.stopped:
                self._finish = "stop"
        self.stats.emitted = self.emitted
        return kept

    def report(self, verdict: Verdict, logits: FloatArray, kept: int) -> None:
        """Note log probabilities of the first ``kept`` tokens of ``verdict``, whose rows ``logits`` has, if wanted."""
        if self.request.params.logprobs is not None:
            rows = zip(verdict.path[:kept], verdict.tokens[:kept], strict=True)
            self._logprobs.extend(self.choice.logprob(logits[row], token) for row, token in rows)

    def chunk(self, kept: list[int], drafters: tuple[tuple[str, ...], ...] = ()) -> Chunk:
        """What :meth:`append` committed last, with its text; once for every call of it, before the next one."""
        if self._stops is not None:
            text, self._ready = self._ready, ""
        else:
            text = self._decoded(kept)
        self._text.append(text)
        count = len(kept)
        logprobs = tuple(self._logprobs[-count:]) if self._logprobs and count else ()
        return Chunk(self.index, text, kept, self._finish, drafters, logprobs)

    def cancel(self) -> Chunk:
        """End the text where it is now."""
        self._finish = "cancelled"
        text = "" if self._stream is None else self._stream.finish()
        self._text.append(text)
        return Chunk(self.index, text, [], "cancelled")

    def _decoded(self, kept: Sequence[int]) -> str:
        if self._stream is None:
            return ""
        ended = self._finish == "eos"
        text = "".join([self._stream.push(token) for token in (kept[:-1] if ended else kept)])
        return text if self._finish is None else text + self._stream.finish()

    def generation(self) -> Generation:
        """The result; only once finished."""
        if self._finish is None:
            raise RuntimeError("the sequence is still running")
        prompt = len(self.request.prompt)
        return Generation(
            "".join(self._text),
            self.tokens[prompt:],
            self._finish,
            prompt,
            self.stats,
            self.cached,
            tuple(self._logprobs),
        )
