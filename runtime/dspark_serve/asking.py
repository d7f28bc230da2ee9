"""From a request's fields to requests of the service, and back to what both kinds of answer share."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.types import Receive

from dspark_runtime.decoding.sequence import FinishReason, Generation
from dspark_runtime.errors import DsparkError
from dspark_runtime.serving.events import Finished
from dspark_runtime.speculation.sampling import SamplingParams
from dspark_serve.errors import from_runtime
from dspark_serve.routes import served_by
from dspark_serve.schemas import Sampling
from dspark_serve.serving import Served
from dspark_serve.streams import Channel

FINISH_REASONS: Mapping[FinishReason, str] = {"eos": "stop", "stop": "stop", "length": "length", "cancelled": "stop"}


@dataclass(frozen=True)
class Ask:
    """What a client asked for, on its way. Choices are numbered prompt by prompt."""

    served: Served
    body: Sampling
    channel: Channel
    identity: str
    created: int

    @property
    def headers(self) -> dict[str, str]:
        """Of the answer."""
        ignored = self.body.ignored()
        return {"x-dspark-ignored": ", ".join(ignored)} if ignored else {}

    @property
    def choices(self) -> range:
        """Numbers of the texts."""
        return range(len(self.channel.handles))

    def frame(self, kind: str) -> dict[str, Any]:
        """What an answer and every chunk of a stream begin with."""
        return {
            "id": self.identity,
            "object": kind,
            "created": self.created,
            "model": self.served.name,
            "system_fingerprint": self.served.fingerprint,
        }


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
            )
            for prompt in prompts
            for choice in range(body.n or 1)
        ]
        channel = served.bridge.submit(requests, deadline=body.timeout, priority=body.priority or 0)
    except DsparkError as error:
        raise from_runtime(error, fields, "messages" if "messages" in fields else "prompt") from error
    request.state.channel = channel
    return Ask(served, body, channel, f"{kind}-{secrets.token_hex(12)}", int(time.time()))


def sampling_params(body: Sampling) -> SamplingParams:
    """How tokens are drawn; OpenAI's defaults, which are not greedy."""

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
    )


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
