"""Grammars that a text has to follow, compiled by llguidance: JSON schemas, regular expressions, choices, Lark.

A compiled grammar is a :class:`dspark_runtime.speculation.guides.Guide`: the decoding loop asks it which tokens may
come next before it draws one. Compiling happens away from the event loop and the engine's thread, within
:data:`COMPILE_SECONDS`; what a mask may cost is bounded by llguidance's own limits.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, regex_to_lark

from dspark_serve.errors import ApiError

if TYPE_CHECKING:
    from dspark_runtime import Bundle

_log = logging.getLogger("dspark_serve")

COMPILE_SECONDS = 2.0
MOST_GRAMMAR_CHARS = 256 * 1024
_KEPT = 64
_LEXER_STATES = 50_000  # of up to 2 kB each
WHITESPACE = r"[ \n\t]{1,20}"  # between the parts of a JSON text, where a model could go on for ever

Kind = Literal["json", "regex", "choice", "grammar"]


class Grammar(NamedTuple):
    """What to compile: a JSON schema, a regular expression, a JSON list of texts, or a Lark grammar.

    ``param`` is the request's field that it comes from.
    """

    kind: Kind
    text: str
    param: str


class Grammars:
    """Compiles grammars for one model, and keeps those that were used last.

    Its vocabulary is made when first needed: half a second for 50 000 tokens.
    """

    def __init__(self, bundle: Bundle, seconds: float = COMPILE_SECONDS) -> None:
        self._tokenizer_json = bundle.codec.tokenizer.to_str
        self._vocab_size = bundle.limits.vocab_size
        self._eos = list(bundle.manifest.model.eos_token_ids)
        self._seconds = seconds
        self._threads = ThreadPoolExecutor(2, "dspark-grammar")
        self._kept: OrderedDict[tuple[Kind, str], LlGuide] = OrderedDict()
        self._made: asyncio.Future[LLTokenizer] | None = None

    async def vocabulary(self) -> LLTokenizer:
        """The tokens' bytes."""
        if self._made is None:
            self._made = asyncio.get_running_loop().run_in_executor(self._threads, self._make_vocabulary)
        return await asyncio.shield(self._made)

    async def token_bytes(self) -> Callable[[int], bytes]:
        """Gives the bytes of a token."""
        vocabulary = await self.vocabulary()
        return lambda token: vocabulary.decode_bytes([token])

    async def compile(self, grammar: Grammar) -> LlGuide:
        """A guide, which any number of requests may use.

        Raises:
            ApiError: the grammar is malformed, too large, or takes too long.
        """
        key = (grammar.kind, grammar.text)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        if not self._eos:
            message = "this model has no end-of-text token, without which a text cannot end where its grammar does"
            raise ApiError(400, message, param=grammar.param)
        if len(grammar.text) > MOST_GRAMMAR_CHARS:
            raise ApiError(400, f"a grammar may have {MOST_GRAMMAR_CHARS} characters", param=grammar.param)
        vocabulary, loop = await self.vocabulary(), asyncio.get_running_loop()
        work = loop.run_in_executor(self._threads, _compiled, grammar, vocabulary, self._vocab_size)
        try:
            guide = await asyncio.wait_for(work, self._seconds)
        except TimeoutError:
            message = f"the grammar was not compiled within {self._seconds} s; make it simpler"
            raise ApiError(400, message, param=grammar.param) from None
        except ValueError as error:
            raise ApiError(400, f"the grammar cannot be used: {error}", param=grammar.param) from error
        self._kept[key] = guide
        if len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        return guide

    def _make_vocabulary(self) -> LLTokenizer:
        return LLTokenizer(
            self._tokenizer_json(), n_vocab=self._vocab_size, eos_token=self._eos or [self._vocab_size - 1]
        )


class LlGuide:
    """A compiled grammar."""

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size

    def start(self) -> LlState:
        """A state at the beginning of a text."""
        return LlState(self._matcher.deep_copy(), self._vocab_size)


class LlState:
    """Where one text is in its grammar."""

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size

    @property
    def stopped(self) -> bool:
        """Whether nothing may follow."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def allowed(self) -> npt.NDArray[np.bool_]:
        """The tokens that may come next, bool [vocab]; none where llguidance gives up."""
        if self._matcher.is_error():  # of the last token
            return self._nothing()
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            return self._nothing()
        return np.unpackbits(bits, count=self._vocab_size, bitorder="little").view(np.bool_)

    def advance(self, token: int) -> None:
        """``token`` came."""
        self._matcher.consume_token(token)

    def accepts(self, tokens: Sequence[int]) -> int:
        """How many of ``tokens`` may follow."""
        return self._matcher.validate_tokens(list(tokens))

    def forced(self) -> list[int]:
        """Tokens that follow without a choice."""
        return self._matcher.compute_ff_tokens()

    def _nothing(self) -> npt.NDArray[np.bool_]:
        _log.warning("a grammar cannot be followed any further: %s", self._matcher.get_error())
        return np.zeros(self._vocab_size, np.bool_)


def _compiled(grammar: Grammar, vocabulary: LLTokenizer, vocab_size: int) -> LlGuide:
    """ValueError with llguidance's message where it cannot be."""
    limits = LLParserLimits(max_lexer_states=_LEXER_STATES, verbose_errors=False)
    matcher = LLMatcher(vocabulary, _source(grammar), log_level=0, limits=limits)
    if matcher.is_error():
        raise ValueError(matcher.get_error())
    mask = matcher.compute_bitmask()  # the first one takes longest
    if matcher.is_error():
        raise ValueError(matcher.get_error())
    if not any(mask):
        raise ValueError("no text fits it")
    return LlGuide(matcher, vocab_size)


def _source(grammar: Grammar) -> str:
    if grammar.kind == "json":
        return LLMatcher.grammar_from_json_schema(grammar.text, overrides={"whitespace_pattern": WHITESPACE})
    if grammar.kind == "regex":
        ascii_digits = regex_to_lark(grammar.text, use_ascii="d")  # as those who parse the text expect them
        return LLMatcher.grammar_from_lark(f"start: /{ascii_digits}/")
    if grammar.kind == "choice":
        choices: list[Any] = json.loads(grammar.text)
        return LLMatcher.grammar_from_lark("start: " + " | ".join(json.dumps(choice) for choice in choices))
    return LLMatcher.grammar_from_lark(grammar.text)
