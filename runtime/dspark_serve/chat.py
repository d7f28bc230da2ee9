"""``POST /v1/chat/completions``."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any

from fastapi import APIRouter, Request
from pydantic_core import to_json
from starlette.responses import Response

from dspark_runtime.decoding.sequence import Chunk, Generation
from dspark_runtime.serving.events import Finished, Tokens
from dspark_serve.asking import FINISH_REASONS, Ask, sampling_params, submit, usage, whole_texts
from dspark_serve.conversations import encoded
from dspark_serve.errors import ApiError
from dspark_serve.logprobs import TokenBytes, chat_logprobs, spoken_logprobs
from dspark_serve.routes import ANSWERS, StrictRoute, served_by
from dspark_serve.schemas import ChatCompletion, ChatRequest
from dspark_serve.sse import EventStream, event

router = APIRouter(route_class=StrictRoute, responses=ANSWERS)

_CHUNK = "chat.completion.chunk"


@router.post("/v1/chat/completions", response_model=ChatCompletion)
async def chat(body: ChatRequest, request: Request) -> Response:
    """Answer a conversation."""
    served = served_by(request)
    served.check_model(body.model)
    _check(body)
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs need logprobs; set it to true", param="top_logprobs")
    logprobs = body.top_logprobs or 0 if body.logprobs else None
    params = await sampling_params(served, body, logprobs)
    prompt = await encoded(served, body.messages, body.chat_template_kwargs)
    most = body.max_completion_tokens or body.max_tokens or max(served.capacity - len(prompt), 1)
    token_bytes = None if logprobs is None else await served.grammars.token_bytes()
    ask = submit(request, body, [prompt], params, most, "chatcmpl")
    if body.stream:
        await ask.channel.begun()
        return EventStream(ask.channel, _Stream(ask, token_bytes).events(), ask.headers)
    generations = await whole_texts(ask.channel, request.receive)
    answer = ask.frame("chat.completion") | {
        "choices": [_choice(index, generation, token_bytes) for index, generation in enumerate(generations)],
        "usage": usage(generations, len(generations)),
    }
    return Response(to_json(answer), media_type="application/json", headers=ask.headers)


class _Stream:
    """One streamed answer."""

    def __init__(self, ask: Ask, token_bytes: TokenBytes | None) -> None:
        self._ask, self._token_bytes = ask, token_bytes
        self._frame = ask.frame(_CHUNK) | ({"usage": None} if ask.with_usage else {})
        self._reports = ask.draft_reports()

    async def events(self) -> AsyncIterator[bytes]:
        ask, ended = self._ask, dict[int, Generation]()
        yield b"".join(self._part(index, {"role": "assistant", "content": ""}) for index in ask.choices)
        while items := await ask.channel.read():
            parts = []
            for index, heard in items:
                if isinstance(heard, Tokens):
                    parts.append(self._text(index, heard.chunk))
                elif isinstance(heard, Finished):
                    ended[index] = heard.generation
                    parts.append(self._part(index, {}, FINISH_REASONS[heard.generation.finish_reason]))
            if text := b"".join(parts):
                yield text
        if ask.with_usage:
            generations = [ended[index] for index in sorted(ended)]
            yield event(self._frame | {"choices": [], "usage": usage(generations, len(generations))})

    def _text(self, index: int, chunk: Chunk) -> bytes:
        more = self._reports[index].of(chunk) if self._reports else {}
        found = spoken_logprobs(chunk.logprobs, chunk.finish_reason)
        if self._token_bytes is not None and found:
            more["logprobs"] = chat_logprobs(found, self._token_bytes)
        return self._part(index, {"content": chunk.text}, None, more) if chunk.text or more else b""

    def _part(
        self, index: int, delta: dict[str, Any], reason: str | None = None, more: Mapping[str, Any] | None = None
    ) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason, **(more or {})}
        return event(self._frame | {"choices": [choice]})


def _choice(index: int, generation: Generation, token_bytes: TokenBytes | None) -> dict[str, Any]:
    found = spoken_logprobs(generation.logprobs, generation.finish_reason)
    return {
        "index": index,
        "message": {"role": "assistant", "content": generation.text, "refusal": None},
        "logprobs": None if token_bytes is None else chat_logprobs(found, token_bytes),
        "finish_reason": FINISH_REASONS[generation.finish_reason],
    }


def _check(body: ChatRequest) -> None:
    """ApiError for fields that contradict each other."""
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options are for streams; set stream to true", param="stream_options")
    if body.max_tokens and body.max_completion_tokens and body.max_tokens != body.max_completion_tokens:
        raise ApiError(400, "max_tokens and max_completion_tokens differ; give one of them", param="max_tokens")
