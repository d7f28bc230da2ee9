"""Lets a bundle write: prompts of its own, and answers to prompts, many at once.

A text depends on the seed, its prompt and, among equal prompts, its number alone; with the sequence kernels that holds
bit by bit, so a run that was interrupted goes on with the same texts. Elsewhere rounding differs with the batch.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from dspark_export.prompts import ROWS
from dspark_runtime import Bundle, SamplingParams, Service, ServiceOptions
from dspark_runtime.errors import ChatTemplateError, UsageError
from dspark_runtime.serving.handle import Handle
from dspark_runtime.text.codec import TextCodec

PROMPT_TOKENS = 96
"""Most tokens of a prompt that a model writes."""
_AHEAD = 4  # requests under way, in rows: none stays empty while the oldest text takes its time
_OWN_PROMPTS = SamplingParams(temperature=1.0, top_p=0.95)
_Wanted = tuple[Sequence[int], SamplingParams, int]  # prompt, how to draw, its number among equal prompts


@dataclass(frozen=True)
class Response:
    """Token ids of a rendered prompt and of what the target answered, with the token that ended it; ``temperature`` 0
    is greedy."""

    prompt: tuple[int, ...]
    response: tuple[int, ...]
    temperature: float

    def span(self, max_length: int) -> tuple[list[int], int]:
        """The first ``max_length`` token ids of prompt and response, and where among them the response begins."""
        ids = [*self.prompt, *self.response][:max_length]
        return ids, min(len(self.prompt), len(ids))


def opening(codec: TextCodec) -> list[int]:
    """Token ids up to where a user's text begins: of the chat template, or of an empty text without a template."""
    try:
        marks = [codec.encode_chat([{"role": "user", "content": mark}]) for mark in ("a", "7")]
    except ChatTemplateError:
        return codec.encode("")
    same = 0
    while same < min(map(len, marks)) and marks[0][same] == marks[1][same]:
        same += 1
    return marks[0][:same]


def self_prompts(
    bundle: Bundle,
    count: int,
    seed: int = 0,
    *,
    first: int = 0,
    max_new_tokens: int = PROMPT_TOKENS,
    rows: int = ROWS,
    speculate: str = "auto",
) -> Iterator[str]:
    """Prompts ``first`` to ``count`` of those that the model writes: what it says, at temperature 1 and top-p 0.95,
    where its chat template has the user begin.

    Texts in the order of their numbers, some of them equal or empty; number n is the same whatever ``first`` and
    ``count`` are. A model without a chat template begins a text: after the token that its tokenizer puts before every
    text, or after the one that ends them.

    Raises:
        UsageError: the bundle has no tokenizer.
    """
    ends = bundle.manifest.model.eos_token_ids
    start = opening(bundle.codec) or list(ends[:1])
    if not start:
        raise UsageError("the model has neither a chat template nor a token that begins or ends a text; give prompts")
    wanted = ((start, _OWN_PROMPTS, number) for number in range(first, count))
    for item in _written(bundle, wanted, len(start), max_new_tokens, seed, rows, speculate):
        said = item.response[:-1] if item.response[-1] in ends else item.response
        yield bundle.codec.decode(list(said)).strip()


def answer(
    bundle: Bundle,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams] | None = None,
    *,
    max_new_tokens: int = 256,
    seed: int = 0,
    rows: int = ROWS,
    speculate: str = "auto",
) -> Iterator[Response]:
    """What the bundle answers to prompts (token ids, see :func:`~dspark_export.prompts.texts.encode`), in their order.

    Args:
        params: how tokens are drawn, None for greedily; a sequence has one for each prompt.
        max_new_tokens: most tokens of an answer; fewer where the model has no room for them.
        seed: of the random numbers; equal prompts of one call get different ones.
        rows: answers that are written at once.
        speculate: drafters, as for :meth:`Bundle.generate`; they change the speed, never the text.

    Raises:
        UsageError: a prompt or an option outside its range.
        CapacityError: a prompt leaves no room for an answer, or the caches do not fit the memory.
    """
    given = params or SamplingParams()
    settings = [given] * len(prompts) if isinstance(given, SamplingParams) else given
    if len(settings) != len(prompts):
        raise UsageError(f"{len(settings)} settings for {len(prompts)} prompts: give one for each, or one for all")
    seen: Counter[tuple[int, ...]] = Counter()

    def numbered() -> Iterator[_Wanted]:
        for prompt, own in zip(prompts, settings, strict=True):
            yield prompt, own, seen[tuple(prompt)]
            seen[tuple(prompt)] += 1

    longest = max(map(len, prompts), default=0)
    return _written(bundle, numbered(), longest, max_new_tokens, seed, rows, speculate)


def _written(
    bundle: Bundle,
    wanted: Iterable[_Wanted],
    longest: int,
    max_new_tokens: int,
    seed: int,
    rows: int,
    speculate: str,
) -> Iterator[Response]:
    """Texts in the order in which they are ``wanted``, whose prompts have at most ``longest`` tokens."""
    capacity = min(longest + max_new_tokens, bundle.limits.positions)
    options = ServiceOptions(rows=rows, capacity=capacity, queue=_AHEAD * rows, speculate=speculate)
    waiting = iter(wanted)
    under_way: deque[Handle] = deque()
    with _service(bundle, options) as service:
        while True:
            while len(under_way) < _AHEAD * rows and (item := next(waiting, None)) is not None:
                prompt, params, number = item
                room = max(1, min(max_new_tokens, capacity - len(prompt)))
                request = service.request(prompt, params, max_new_tokens=room, seed=seed, choice=number)
                under_way.append(service.submit(request))
            if not under_way:
                return
            handle = under_way.popleft()
            tokens = tuple(handle.result().tokens)
            yield Response(handle.request.prompt, tokens, handle.request.params.temperature)


def _service(bundle: Bundle, options: ServiceOptions) -> Service:
    """A service of ``bundle``, which need not be exact where only a slow one could be: texts may differ by rounding."""
    try:
        return bundle.serve(options)
    except UsageError:
        if not bundle.exact:
            raise
    threads = bundle.engine_options.threads
    inexact = Bundle.open(bundle.files.root, threads=threads, exact=False, verify_digests=False)
    return inexact.with_phrases(bundle.phrases).serve(options)
