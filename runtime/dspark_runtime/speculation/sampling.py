"""From logits to a token: temperature, top-k, top-p, min-p, and random numbers that depend only on the position.

The filters apply in this order, each on the distribution the one before it left: temperature, ``top_k``, ``top_p``
(fewest tokens whose mass reaches it), ``min_p`` (share of the largest probability). Where probabilities tie at a cut,
lower token ids stay. A token is drawn by inverse CDF over ids in ascending order, from one uniform number.

The uniform numbers come from a counter-based generator (SplitMix64, Steele, Lea and Flood 2014, as a keyed hash) over
(seed, request, stream, position). Whatever is drafted, verified or batched, the draw at a position uses the same one.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from dspark_runtime.arguments import real, whole
from dspark_runtime.arrays import FloatArray
from dspark_runtime.errors import BackendError, UsageError
from dspark_runtime.speculation.guides import Guide

MOST_LOGPROBS = 20
MOST_BIASES = 300
GREEDY_BELOW = 1e-5  # lower temperatures are taken as 0
DRAW, ACCEPT, DRAFT = 0, 1, 2  # streams: drawing a token, accepting a sampled draft, drawing one

_NUMBERS = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
_MIX1, _MIX2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_BLOCK = 256


@dataclass(frozen=True)
class SamplingParams:
    """What a request wants of its text. None of it depends on how the text is drafted.

    ``temperature`` 0 is greedy; ``top_k`` 0, ``top_p`` 1 and ``min_p`` 0 switch a filter off.

    Args:
        presence_penalty: taken off the logits of tokens that are in the text already, -2 to 2.
        frequency_penalty: the same for each time they are, -2 to 2.
        repetition_penalty: divides positive logits of tokens in prompt and text, multiplies negative ones; 0.01 to
            100.
        logit_bias: added to the logits of these token ids, -100 to 100, for at most 300 of them.
        logprobs: report the log probability of every token, and of this many of the most likely ones, at most 20;
            None for none.
        guide: the text has to follow this grammar.
        max_new_tokens: most tokens of the text; None for that of the call.
        seed: of the random numbers; None for that of the call.
        stop: strings that end the text; None for those of the call.

    Raises:
        UsageError: a value outside its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | Iterable[tuple[int, float]] = ()
    logprobs: int | None = None
    guide: Guide | None = None
    max_new_tokens: int | None = None
    seed: int | None = None
    stop: str | Sequence[str] | None = None

    def __post_init__(self) -> None:
        for name in _NUMBERS:
            value = getattr(self, name)
            number = real(value)
            if number is None or not math.isfinite(number):
                raise UsageError(f"{name}={value!r} is not a finite number")
            object.__setattr__(self, name, number)  # of numpy or torch: a plain one from here on
        if self.temperature < 0:
            raise UsageError(f"temperature={self.temperature} is negative; give 0 for greedy text or a positive number")
        try:
            object.__setattr__(self, "top_k", whole("top_k", self.top_k, 0))
        except UsageError:
            raise UsageError(f"top_k={self.top_k!r}: give a number of tokens, or 0 to switch the filter off") from None
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p={self.top_p}: give a number above 0 and at most 1 (1 switches the filter off)")
        if not 0 <= self.min_p <= 1:
            raise UsageError(f"min_p={self.min_p}: give a number from 0 (which switches the filter off) to 1")
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2 <= getattr(self, name) <= 2:
                raise UsageError(f"{name}={getattr(self, name)}: give a number from -2 to 2 (0 switches it off)")
        if not 0.01 <= self.repetition_penalty <= 100:  # logits stay finite
            raise UsageError(
                f"repetition_penalty={self.repetition_penalty}: give a number from 0.01 to 100 (1 switches it off)"
            )
        object.__setattr__(self, "logit_bias", _checked_bias(self.logit_bias))
        if self.logprobs is not None:
            object.__setattr__(self, "logprobs", whole("logprobs", self.logprobs, 0, MOST_LOGPROBS))
        if self.stop is not None and not isinstance(self.stop, str) and hasattr(self.stop, "__iter__"):
            object.__setattr__(self, "stop", tuple(self.stop))
        if self.guide is not None and not hasattr(self.guide, "start"):
            raise UsageError(f"guide={self.guide!r:.60}: give a compiled grammar, or None")

    @property
    def biases(self) -> tuple[tuple[int, float], ...]:
        """``logit_bias`` as pairs of token and number, ascending."""
        return cast(tuple[tuple[int, float], ...], self.logit_bias)

    @property
    def adjusts(self) -> bool:
        """Whether logits are changed, by what the text holds so far, before a token is drawn from them."""
        return bool(
            self.presence_penalty
            or self.frequency_penalty
            or self.repetition_penalty != 1
            or self.logit_bias
            or self.guide is not None
        )

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken."""
        return self.temperature < GREEDY_BELOW

    @property
    def filtered(self) -> bool:
        """Whether any filter is on."""
        return bool(self.top_k) or self.top_p < 1 or self.min_p > 0

    def check_vocabulary(self, vocab_size: int) -> None:
        """UsageError if ``top_k`` asks for more tokens than there are, or ``logit_bias`` for one there is not."""
        if self.top_k > vocab_size:
            raise UsageError(f"top_k={self.top_k}, but the vocabulary has {vocab_size} tokens; 0 means no filter")
        if unknown := [token for token, _ in self.biases if token >= vocab_size]:
            raise UsageError(f"logit_bias for token {unknown[0]}, but the vocabulary has {vocab_size} tokens")


def _checked_bias(bias: Any) -> tuple[tuple[int, float], ...]:
    """Pairs of token and bias, ascending; UsageError for anything else."""
    try:
        pairs = [(key, value) for key, value in (bias.items() if isinstance(bias, Mapping) else bias)]
    except (TypeError, ValueError):
        raise UsageError(f"logit_bias={bias!r:.60}: give a mapping from token ids to numbers") from None
    if len(pairs) > MOST_BIASES:
        raise UsageError(f"logit_bias for {len(pairs)} tokens; at most {MOST_BIASES} are possible")
    checked = {}
    for token, value in pairs:
        number = real(value)
        if number is None or not -100 <= number <= 100:
            raise UsageError(f"logit_bias {value!r} for token {token!r}: give a number from -100 to 100")
        checked[whole("a token of logit_bias", token, 0, None, "a token id")] = number
    return tuple(sorted(checked.items()))


def request_key(prompt: Sequence[int], occurrence: int = 0) -> int:
    """Number of a request for :func:`uniforms`: its prompt, and how many equal prompts precede it in the same call.

    So a request keeps its text whatever it is batched with, and equal prompts in one call get different texts.
    """
    digest = hashlib.blake2b(np.asarray(prompt, "<i8").tobytes(), digest_size=8, key=occurrence.to_bytes(8, "little"))
    return int.from_bytes(digest.digest(), "little")


def _mix(value: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    value = (value ^ (value >> np.uint64(30))) * _MIX1
    value = (value ^ (value >> np.uint64(27))) * _MIX2
    return value ^ (value >> np.uint64(31))


def uniforms(seed: int, request: int, stream: int, positions: npt.ArrayLike) -> FloatArray:
    """float32 uniforms in [0, 1) of the given positions; ``seed`` and ``request`` are 64-bit numbers."""
    key = _mix(np.array([seed], np.uint64) + _GOLDEN)
    key = _mix(key ^ np.array([request], np.uint64)) + np.array([stream], np.uint64) * _MIX1
    bits = _mix(_mix(key) + np.asarray(positions, np.uint64) * _GOLDEN)
    return ((bits >> np.uint64(40)).astype(np.float32)) * np.float32(2.0**-24)


class UniformStream:
    """The uniforms of one (seed, request, stream), computed in blocks as positions are requested."""

    def __init__(self, seed: int, request: int, stream: int) -> None:
        self._key = (seed, request, stream)
        self._block = -1
        self._values: FloatArray = np.zeros(0, np.float32)

    def at(self, position: int) -> float:
        """The uniform of ``position``, in [0, 1)."""
        block, offset = divmod(position, _BLOCK)
        if block != self._block:
            self._values = uniforms(*self._key, np.arange(block * _BLOCK, (block + 1) * _BLOCK))
            self._block = block
        return float(self._values[offset])


def greedy_token(logits: FloatArray) -> int:
    """Token of the largest logit of one row [vocab], the lowest id where several tie; BackendError if it is NaN."""
    token = int(logits.argmax())
    if logits[token] != logits[token]:
        raise BackendError("the model gave logits that are not numbers; its weights or its precision are damaged")
    return token


def draw_token(logits: FloatArray, params: SamplingParams, uniform: float) -> int:
    """Token of one row [vocab] for one uniform number in [0, 1)."""
    if params.greedy:
        return greedy_token(logits)
    if not params.filtered:
        return inverse_cdf(_weights(logits, params.temperature), uniform)
    ids, weights = _candidates(_weights(logits, params.temperature), params)
    return int(ids[inverse_cdf(weights, uniform)])


def distribution(logits: FloatArray, params: SamplingParams) -> FloatArray:
    """Probabilities [vocab] that :func:`draw_token` draws from; one-hot for greedy."""
    result = np.zeros(logits.shape[-1], np.float32)
    if params.greedy:
        result[greedy_token(logits)] = 1
        return result
    ids, weights = _candidates(_weights(logits, params.temperature), params)
    result[ids] = weights / weights.sum()
    return result


def inverse_cdf(weights: FloatArray, uniform: float) -> int:
    """First index at which the cumulative weight passes ``uniform`` times the total; it always has weight above 0."""
    size = len(weights)
    blocks = size // _BLOCK
    start = 0
    if blocks > 4:
        # Sums of blocks first: a fifth of the time of a cumulative sum over a whole vocabulary.
        sums = weights[: blocks * _BLOCK].reshape(blocks, _BLOCK).sum(axis=1, dtype=np.float64)
        totals = np.cumsum(sums)
        tail = float(weights[blocks * _BLOCK :].sum(dtype=np.float64))
        goal = uniform * (float(totals[-1]) + tail)
        block = int(np.searchsorted(totals, goal, side="right"))
        start = block * _BLOCK
        goal -= float(totals[block - 1]) if block else 0.0
        part = weights[start : start + _BLOCK] if block < blocks else weights[start:]
    else:
        part = weights
        goal = uniform * float(part.sum(dtype=np.float64))
    index = start + int(np.searchsorted(np.cumsum(part, dtype=np.float64), goal, side="right"))
    if index < size and weights[index] > 0:
        return index
    # Rounding at the end of a block or of the row: the nearest token with weight, below if there is one.
    positive = np.flatnonzero(weights)
    below = positive[positive < index]
    return int(below[-1] if len(below) else positive[0])


def _weights(logits: FloatArray, temperature: float) -> FloatArray:
    top = logits.max()
    if not np.isfinite(top):
        raise BackendError("the model gave logits that are not finite; its weights or its precision are damaged")
    scaled: FloatArray = logits - top
    scaled *= np.float32(1.0 / temperature)
    np.exp(scaled, out=scaled)
    return scaled


def _candidates(weights: FloatArray, params: SamplingParams) -> tuple[npt.NDArray[np.int64], FloatArray]:
    """Ids, ascending, and weights of the tokens that pass the filters."""
    ids = np.arange(len(weights))
    if 0 < params.top_k < len(weights):
        ids = _largest(weights, params.top_k)
    if params.top_p < 1:
        ids = ids[_nucleus(weights[ids], params.top_p)]
    kept = weights[ids]
    if params.min_p > 0:
        stay = kept >= params.min_p * kept.max()
        ids, kept = ids[stay], kept[stay]
    stay = kept > 0
    return ids[stay], kept[stay]


def _largest(weights: FloatArray, count: int) -> npt.NDArray[np.int64]:
    """Ascending indices of the ``count`` largest weights; among equals at the cut, the lowest indices."""
    cut = np.partition(weights, len(weights) - count)[len(weights) - count]
    above = np.flatnonzero(weights > cut)
    equal = np.flatnonzero(weights == cut)[: count - len(above)]
    return np.sort(np.concatenate([above, equal]))


def _nucleus(weights: FloatArray, top_p: float) -> npt.NDArray[np.int64]:
    """Ascending indices of the fewest weights, largest first, whose share of the total reaches ``top_p``."""
    goal = top_p * float(weights.sum(dtype=np.float64))
    count = min(256, len(weights))
    while True:
        few = _largest(weights, count) if count < len(weights) else np.arange(len(weights))
        order = few[np.argsort(-weights[few], kind="stable")]
        mass = np.cumsum(weights[order], dtype=np.float64)
        if mass[-1] >= goal or count == len(weights):
            return np.sort(order[: int(np.searchsorted(mass, goal, side="left")) + 1])
        count = min(count * 8, len(weights))


class Sampler:
    """Draws the tokens of one request; the draw at a position does not depend on any other draw."""

    def __init__(self, params: SamplingParams, seed: int, request: int) -> None:
        self.params = params
        self._draws = UniformStream(seed, request, DRAW)
        self._accepts = UniformStream(seed, request, ACCEPT)
        self._drafts = UniformStream(seed, request, DRAFT)

    def draw(self, logits: FloatArray, position: int) -> int:
        """Token for ``position``, from the logits [vocab] of the row before it."""
        if self.params.greedy:
            return greedy_token(logits)
        return draw_token(logits, self.params, self._draws.at(position))

    def draw_from(self, weights: FloatArray, position: int) -> int:
        """Token for ``position`` from weights [vocab] instead of logits."""
        return inverse_cdf(weights, self._draws.at(position))

    def uniform_at(self, position: int) -> float:
        """The uniform that :meth:`draw` uses at ``position``."""
        return self._draws.at(position)

    def accept_at(self, position: int) -> float:
        """Uniform deciding about a sampled draft at ``position``."""
        return self._accepts.at(position)

    def draft_uniforms(self, start: int, count: int, coupled: bool) -> FloatArray:
        """float32 [count]: uniforms a drafter draws the tokens of positions ``start``, ... with.

        ``coupled``: the very ones :meth:`draw` uses, so that a draft distribution close to the target's gives the
        token the target will draw. Otherwise independent ones, as rejection sampling needs them.
        """
        stream = self._draws if coupled else self._drafts
        return np.array([stream.at(position) for position in range(start, start + count)], np.float32)
