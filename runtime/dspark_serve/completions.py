"""``POST /v1/completions``."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from pydantic_core import to_json
from starlette.responses import Response

from dspark_runtime.decoding.sequence import Chunk, Generation
from dspark_runtime.errors import DsparkError
from dspark_runtime.serving.events import Finished, Tokens
from dspark_serve.asking import (
    FINISH_REASONS,
    Ask,
    guide_headers,
    guide_report,
    sampling_params,
    submit,
    usage,
    whole_texts,
)
from dspark_serve.errors import ApiError, from_runtime
from dspark_serve.logprobs import TokenBytes, completion_logprobs, spoken_logprobs
from dspark_serve.routes import ANSWERS, STREAMED, StrictRoute, served_by
from dspark_serve.schemas import Completion, CompletionRequest
from dspark_serve.serving import Served
from dspark_serve.sse import EventStream, event

router = APIRouter(route_class=StrictRoute, responses=ANSWERS)

DEFAULT_TOKENS = 16
_KIND = "text_completion"


@router.post("/v1/completions", response_model=Completion, responses=STREAMED)
async def completions(body: CompletionRequest, request: Request) -> Response:
    """Continue texts."""
    served = served_by(request)
    served.check_model(body.model)
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options are for streams; set stream to true", param="stream_options")
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise ApiError(400, "best_of differs from n; texts are not ranked, ask for n of them", param="best_of")
    params = await sampling_params(served, body, body.logprobs)
    prompts = await _encoded(served, body)
    token_bytes = None if body.logprobs is None else await served.grammars.token_bytes()
    ask = submit(request, body, prompts, params, body.max_tokens or DEFAULT_TOKENS, "cmpl")
    if body.stream:
        await ask.channel.begun()
        return EventStream(ask.channel, _events(ask, token_bytes), ask.headers)
    generations = await whole_texts(ask.channel, request.receive)
    answer = ask.frame(_KIND) | {
        "choices": [_whole(index, generation, token_bytes) for index, generation in enumerate(generations)],
        "usage": usage(generations, body.n or 1),
    }
    return Response(to_json(answer), media_type="application/json", headers=ask.headers | guide_headers(generations))


async def _events(ask: Ask, token_bytes: TokenBytes | None) -> AsyncIterator[bytes]:
    frame = ask.frame(_KIND) | ({"usage": None} if ask.with_usage else {})
    ended: dict[int, Generation] = {}
    texts = _Texts(ask, frame, token_bytes)
    while items := await ask.channel.read():
        parts = []
        for index, heard in items:
            if isinstance(heard, Tokens):
                parts += texts.of(index, heard.chunk)
            elif isinstance(heard, Finished):
                ended[index] = heard.generation
                reason = FINISH_REASONS[heard.generation.finish_reason]
                choice = _choice(index, "", reason) | guide_report(heard.generation)
                parts.append(event(frame | {"choices": [choice]}))
        if parts:
            yield b"".join(parts)
    if ask.with_usage:
        generations = [ended[index] for index in sorted(ended)]
        yield event(frame | {"choices": [], "usage": usage(generations, ask.body.n or 1)})


class _Texts:
    """Events of the texts of one stream."""

    def __init__(self, ask: Ask, frame: dict[str, Any], token_bytes: TokenBytes | None) -> None:
        self._frame, self._token_bytes = frame, token_bytes
        self._offsets = [0 for _ in ask.choices]
        self._reports, self._split = ask.draft_reports(), ask.chunk_splitter()

    def of(self, index: int, heard: Chunk) -> list[bytes]:
        """What choice ``index`` got."""
        events = []
        for chunk in self._split(index, heard):
            more = self._reports[index].of(chunk) if self._reports else {}
            found = spoken_logprobs(chunk.logprobs, chunk.finish_reason)
            if self._token_bytes is not None and found:
                more["logprobs"] = completion_logprobs(found, self._token_bytes, self._offsets[index])
            self._offsets[index] += len(chunk.text)
            if chunk.text or more:
                events.append(event(self._frame | {"choices": [_choice(index, chunk.text, None) | more]}))
        return events


def _whole(index: int, generation: Generation, token_bytes: TokenBytes | None) -> dict[str, Any]:
    choice = _choice(index, generation.text, FINISH_REASONS[generation.finish_reason]) | guide_report(generation)
    if token_bytes is None:
        return choice
    found = spoken_logprobs(generation.logprobs, generation.finish_reason)
    return choice | {"logprobs": completion_logprobs(found, token_bytes, 0)}


def _choice(index: int, text: str, reason: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": reason}


async def _encoded(served: Served, body: CompletionRequest) -> list[list[int]]:
    """Token ids of every prompt."""

    def encode() -> list[list[int]]:
        return [served.codec.encode(item) if isinstance(item, str) else item for item in body.prompts()]

    try:
        return await served.on_text_thread(encode)
    except DsparkError as error:
        raise from_runtime(error, default_param="prompt") from error
