"""One request, checked before anything runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dspark_runtime.arguments import whole
from dspark_runtime.errors import CapacityError, UsageError
from dspark_runtime.speculation.sampling import SamplingParams, request_key

DEFAULT_NEW_TOKENS = 256
MAX_STOPS = 16
MAX_STOP_LENGTH = 1000


@dataclass(frozen=True)
class Limits:
    """What requests must fit: vocabulary, positions of the model and cache slots of the opened bundle."""

    vocab_size: int
    positions: int


@dataclass(frozen=True)
class Request:
    """A checked request. ``key`` is its identity for random numbers; ``eos`` are the token ids that end a text.

    Context is reused only between requests of one ``scope``. Nothing is drafted for one that is not to ``speculate``.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    params: SamplingParams
    seed: int
    key: int
    stops: tuple[str, ...]
    eos: frozenset[int]
    scope: str = ""
    speculate: bool = True


def make_requests(
    prompts: Sequence[Sequence[int]],
    limits: Limits,
    *,
    max_new_tokens: int | None = None,
    params: SamplingParams | Sequence[SamplingParams] | None = None,
    seed: int = 0,
    stop: str | Sequence[str] | None = (),
    eos: Sequence[int] = (),
) -> list[Request]:
    """Check the prompts and options of one call; equal prompts get different random numbers.

    A sequence of ``params`` has those of each prompt; for other arguments and errors see :func:`make_request`.
    """
    settings = _checked_settings(params, len(prompts), limits)
    if not prompts:
        raise UsageError("there is no prompt; give at least one")
    requests = []
    seen: Counter[tuple[int, ...]] = Counter()
    for prompt, own in zip(prompts, settings, strict=True):
        request = make_request(
            prompt,
            limits,
            max_new_tokens=max_new_tokens,
            params=own,
            seed=seed,
            stop=stop,
            eos=eos,
            occurrence=lambda tokens: seen[tokens],
        )
        requests.append(request)
        seen[request.prompt] += 1
    return requests


def make_request(
    prompt: Sequence[int],
    limits: Limits,
    *,
    max_new_tokens: int | None = None,
    params: SamplingParams | None = None,
    seed: int = 0,
    stop: str | Sequence[str] | None = (),
    eos: Sequence[int] = (),
    occurrence: int | Callable[[tuple[int, ...]], int] = 0,
    scope: str = "",
    speculate: bool = True,
) -> Request:
    """Check one prompt and its options.

    Args:
        prompt: token ids.
        limits: what must be fit.
        max_new_tokens: most tokens of the text; None for 256 or what still fits.
        params: how tokens are drawn; its own ``max_new_tokens``, ``seed`` and ``stop`` come before these arguments.
        seed: of the random numbers.
        stop: strings that end the text.
        eos: token ids that end it.
        occurrence: a number that tells equal prompts apart, or what gives it for the checked prompt.
        scope: whose context may be reused.
        speculate: whether anything is drafted for it.

    Raises:
        UsageError: an option or the prompt outside its range.
        CapacityError: the prompt with its new tokens has no room.
    """
    own = _checked_settings(params, 1, limits)[0]
    seed = _checked_seed(seed if own.seed is None else own.seed)
    if own.max_new_tokens is not None:
        max_new_tokens = own.max_new_tokens
    if max_new_tokens is not None:
        max_new_tokens = whole("max_new_tokens", max_new_tokens, 1)
    stops = _checked_stops(stop if own.stop is None else own.stop)
    _check_guide(own, limits)
    tokens = _checked_prompt(prompt, limits)
    number = occurrence(tokens) if callable(occurrence) else occurrence
    return Request(
        prompt=tokens,
        max_new_tokens=_room(len(tokens), max_new_tokens, limits),
        params=own,
        seed=seed,
        key=request_key(tokens, number),
        stops=stops,
        eos=frozenset(eos),
        scope=scope,
        speculate=speculate,
    )


def _checked_settings(params: object, prompts: int, limits: Limits) -> list[SamplingParams]:
    """One setting for each prompt, of which there are ``prompts``."""
    if params is None or isinstance(params, SamplingParams):
        settings = [params or SamplingParams()] * prompts
    elif isinstance(params, Sequence) and all(isinstance(item, SamplingParams) for item in params):
        settings = list(params)
    else:
        raise UsageError(f"params={params!r:.60}: give SamplingParams, or a list of them with one for each prompt")
    if len(settings) != prompts:
        raise UsageError(
            f"params has {len(settings)} settings and the number of prompts is {prompts}; "
            "give one for each prompt, or a single SamplingParams for all"
        )
    for own in settings:
        own.check_vocabulary(limits.vocab_size)
    return settings


def _check_guide(params: SamplingParams, limits: Limits) -> None:
    if params.guide is None:
        return
    state = params.guide.start()
    if not state.stopped and not state.allowed()[: limits.vocab_size].any():
        raise UsageError("guide: its grammar allows no token to begin with; give one that some text fits")


def _checked_seed(seed: object) -> int:
    try:
        return whole("seed", seed, 0, 2**64 - 1)
    except UsageError:
        raise UsageError(f"seed={seed!r}: give a whole number from 0 to 2**64 - 1") from None


def _checked_stops(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    if stop is None:
        return ()
    if not isinstance(stop, str) and (isinstance(stop, bytes) or not hasattr(stop, "__iter__")):
        raise UsageError(f"stop={stop!r}: give a text, or a list of texts")
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if len(stops) > MAX_STOPS:
        raise UsageError(f"{len(stops)} stop strings; at most {MAX_STOPS} are possible")
    for text in stops:
        if not isinstance(text, str) or not text:
            raise UsageError(f"stop string {text!r}: stop strings are non-empty text")
        if len(text) > MAX_STOP_LENGTH:
            raise UsageError(f"a stop string of {len(text)} characters; at most {MAX_STOP_LENGTH} are possible")
    return stops


def _checked_prompt(prompt: Sequence[int], limits: Limits) -> tuple[int, ...]:
    tokens = tuple(prompt)
    if not tokens:
        raise UsageError("the prompt is empty: it holds no token; give some text or token ids")
    for place, token in enumerate(tokens):
        if isinstance(token, bool) or not hasattr(token, "__index__"):
            raise UsageError(f"prompt token {place} is {token!r}, not a token id")
        if not 0 <= int(token) < limits.vocab_size:
            raise UsageError(f"prompt token {place} is {token}, outside the vocabulary of {limits.vocab_size}")
    return tuple(int(token) for token in tokens)


def _room(prompt: int, wanted: int | None, limits: Limits) -> int:
    room = limits.positions - prompt
    if room < 1:
        raise CapacityError(
            f"the prompt has {prompt} tokens and the limit is {limits.positions} for prompt and text together; "
            "shorten the prompt"
        )
    if wanted is None:
        return min(DEFAULT_NEW_TOKENS, room)
    if wanted > room:
        raise CapacityError(
            f"{prompt} prompt tokens and max_new_tokens={wanted} exceed the limit of {limits.positions}; "
            f"ask for at most {room}"
        )
    return wanted
