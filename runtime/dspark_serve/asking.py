"""From a request's fields to requests of the service, and back to what both kinds of answer share."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from starlette.requests import Request
from starlette.types import Receive

from dspark_runtime.bundle.manifest import DrafterEntry
from dspark_runtime.decoding.request import Request as ServiceRequest
from dspark_runtime.decoding.sequence import Chunk, FinishReason, Generation
from dspark_runtime.errors import DsparkError
from dspark_runtime.serving.events import Finished
from dspark_runtime.speculation.sampling import SamplingParams
from dspark_runtime.text.stream import TextStream
from dspark_serve.errors import ApiError, from_runtime
from dspark_serve.guides import Grammar, Kind
from dspark_serve.routes import served_by
from dspark_serve.schemas import JsonObjectFormat, JsonSchemaFormat, ResponseFormat, Sampling
from dspark_serve.serving import Served
from dspark_serve.splitting import Splitter
from dspark_serve.streams import Channel

FINISH_REASONS: Mapping[FinishReason, str] = {
    "eos": "stop",
    "stop": "stop",
    "length": "length",
    "cancelled": "stop",
    "dead_end": "stop",  # OpenAI has no word for it; see guide_report
}


@dataclass(frozen=True)
class Ask:
    """What a client asked for, on its way. Choices are numbered prompt by prompt."""

    served: Served
    body: Sampling
    channel: Channel
    identity: str
    created: int
    speculation: Speculation

    @property
    def headers(self) -> dict[str, str]:
        """Of the answer."""
        ignored = self.body.ignored()
        headers = {"x-dspark-speculation": str(self.speculation)}
        return headers | {"x-dspark-ignored": ", ".join(ignored)} if ignored else headers

    @property
    def choices(self) -> range:
        """Numbers of the texts."""
        return range(len(self.channel.handles))

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        options = self.body.stream_options
        return bool(options and options.include_usage)

    def chunk_splitter(self) -> Callable[[int, Chunk], Sequence[Chunk]]:
        """Gives what of a choice's chunk goes into events of their own: all of it, or each token."""
        options = self.body.stream_options
        if not (options and options.token_by_token):
            return lambda _, chunk: [chunk]
        tokenizer = self.served.codec.tokenizer
        splitters = [Splitter(tokenizer, handle.request) for handle in self.channel.handles]
        return lambda index, chunk: splitters[index].split(chunk)

    def draft_reports(self) -> list[DraftReport]:
        """One for each choice of a stream that is to tell who drafted what; else none."""
        options = self.body.stream_options
        if not (options and options.include_drafters):
            return []
        tokenizer = self.served.codec.tokenizer
        return [DraftReport(TextStream(tokenizer, handle.request.prompt)) for handle in self.channel.handles]

    def frame(self, kind: str) -> dict[str, Any]:
        """What an answer and every chunk of a stream begin with."""
        return {
            "id": self.identity,
            "object": kind,
            "created": self.created,
            "model": self.served.name,
            "system_fingerprint": self.served.fingerprint,
        }


class DraftReport:
    """Tells who drafted the tokens of one text."""

    def __init__(self, texts: TextStream) -> None:
        self._texts = texts

    def of(self, chunk: Chunk) -> dict[str, Any]:
        """For each token its text and the names of the drafters that proposed it; none for the target's own."""
        drafters = [list(names) for names in chunk.drafters] or [[] for _ in chunk.tokens]
        return {"token_texts": [self._texts.push(token) for token in chunk.tokens], "drafters": drafters}


def submit(
    request: Request,
    body: Sampling,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    most: int | None,
    kind: str,
) -> Ask:
    """Let every choice of every prompt join the service that ``request`` is for.

    Raises:
        ApiError: a value or a prompt outside its range, or the service takes no requests now.
    """
    served = served_by(request)
    seed = secrets.randbits(63) if body.seed is None else body.seed % 2**64
    fields = type(body).model_fields
    try:
        requests = [
            served.service.request(
                prompt,
                params,
                max_new_tokens=most,
                seed=seed,
                stop=body.stops(),
                ignore_eos=bool(body.ignore_eos),
                choice=choice,
                speculate=body.speculate or "auto",
                scope=request.scope.get("state", {}).get("key", ""),  # one key does not learn what another has sent
            )
            for prompt in prompts
            for choice in range(body.n or 1)
        ]
        with served.metrics.asking(request.headers):
            channel = served.bridge.submit(
                requests, parts=bool(body.stream), deadline=body.timeout, priority=body.priority or 0
            )
    except DsparkError as error:
        raise from_runtime(error, fields, "messages" if "messages" in fields else "prompt") from error
    request.state.channel = channel
    speculation = speculation_of(served.service.drafters, served.bundle.manifest.drafters, requests)
    served.metrics.speculated(speculation.state)
    return Ask(served, body, channel, f"{kind}-{secrets.token_hex(12)}", int(time.time()), speculation)


@dataclass(frozen=True)
class Speculation:
    """Whether requests are drafted for: ``auto``, ``partial`` (a text may grow longer than a draft model reaches) or
    ``off``, and why."""

    state: Literal["auto", "partial", "off"]
    reason: str = ""

    def __str__(self) -> str:
        """As the header has it."""
        return f"{self.state}; {self.reason}" if self.reason else self.state


def speculation_of(
    names: Sequence[str], entries: Sequence[DrafterEntry], requests: Sequence[ServiceRequest]
) -> Speculation:
    """What the drafters ``names`` do for ``requests``, which share their settings; ``entries`` are the bundle's."""
    if not names:
        return Speculation("off", "server")
    if not requests[0].speculate:
        return Speculation("off", "request")
    longest = max(len(request.prompt) + request.max_new_tokens for request in requests)
    reach = [
        f"{entry.name} up to {entry.max_positions} tokens"
        for entry in entries
        if entry.name in names and entry.max_positions is not None and entry.max_positions < longest
    ]
    return Speculation("partial", ", ".join(reach)) if reach else Speculation("auto")


def grammar_of(body: Sampling) -> Grammar | None:
    """What the text has to follow.

    Raises:
        ApiError: more than one field says so, or one that contradicts it.
    """
    wanted = {
        "response_format": _format_schema(body.response_format),
        "guided_json": body.guided_json if isinstance(body.guided_json, str | None) else json.dumps(body.guided_json),
        "guided_regex": body.guided_regex,
        "guided_choice": None if body.guided_choice is None else json.dumps(body.guided_choice),
        "guided_grammar": body.guided_grammar,
    }
    given = {name: text for name, text in wanted.items() if text is not None}
    if not given:
        return None
    if len(given) > 1:
        raise ApiError(400, f"{' and '.join(given)} were given; a text follows one of them", param=list(given)[1])
    ((name, text),) = given.items()
    if body.ignore_eos:
        raise ApiError(400, f"ignore_eos goes on where {name} ends the text; leave one out", param="ignore_eos")
    kind: Kind = "json" if name == "response_format" else cast(Kind, name.removeprefix("guided_"))
    return Grammar(kind, text, name)


def _format_schema(wanted: ResponseFormat | None) -> str | None:
    if isinstance(wanted, JsonSchemaFormat):
        return json.dumps(wanted.json_schema.schema_)
    return '{"type": "object"}' if isinstance(wanted, JsonObjectFormat) else None


async def sampling_params(
    served: Served, body: Sampling, logprobs: int | None, calls: Grammar | None = None
) -> SamplingParams:
    """How tokens are drawn; OpenAI's defaults, which are not greedy. ``calls``: a grammar that tools demand.

    Raises:
        ApiError: the grammar cannot be used.
    """
    grammar = calls or grammar_of(body)
    guide = None if grammar is None else await served.grammars.compile(grammar)

    def given(name: str, default: Any) -> Any:
        value = getattr(body, name)
        return default if value is None else value

    return SamplingParams(
        temperature=given("temperature", 1.0),
        top_k=given("top_k", 0),
        top_p=given("top_p", 1.0),
        min_p=given("min_p", 0.0),
        presence_penalty=given("presence_penalty", 0.0),
        frequency_penalty=given("frequency_penalty", 0.0),
        repetition_penalty=given("repetition_penalty", 1.0),
        logit_bias=body.biases(),
        logprobs=logprobs,
        guide=guide,
    )


def guide_report(generation: Generation) -> dict[str, str]:
    """Beside the finish reason of a choice: whether its grammar was left incomplete."""
    return {"guide": "incomplete"} if generation.finish_reason == "dead_end" else {}


def guide_headers(generations: Sequence[Generation]) -> dict[str, str]:
    """The same of a whole answer, in a header."""
    return {"x-dspark-guide": "incomplete"} if any(map(guide_report, generations)) else {}


async def whole_texts(channel: Channel, receive: Receive) -> list[Generation]:
    """Wait for every text.

    Raises:
        ApiError: one of them failed, or the client went away.
    """
    found: dict[int, Generation] = {}
    watcher = asyncio.create_task(_watch(channel, receive))
    try:
        while items := await channel.read():
            found |= {item.choice: item.event.generation for item in items if isinstance(item.event, Finished)}
    finally:
        watcher.cancel()
        channel.cancel()
    return [found[index] for index in sorted(found)]


def usage(generations: Sequence[Generation], choices: int) -> dict[str, Any]:
    """Tokens of all texts, of which ``choices`` share a prompt."""
    first = [generation for place, generation in enumerate(generations) if place % choices == 0]
    prompt = sum(generation.prompt_tokens for generation in first)
    made = sum(len(generation.tokens) for generation in generations)
    accepted = sum(generation.stats.accepted for generation in generations)
    verified = sum(generation.stats.verified for generation in generations)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": made,
        "total_tokens": prompt + made,
        "prompt_tokens_details": {"cached_tokens": sum(generation.cached_tokens for generation in first)},
        "completion_tokens_details": {
            "accepted_prediction_tokens": accepted,
            "rejected_prediction_tokens": verified - accepted,
            "reasoning_tokens": 0,
        },
    }


async def _watch(channel: Channel, receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    channel.abandon()
