"""``POST /v1/chat/completions``."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from pydantic_core import to_json
from starlette.responses import Response

from dspark_runtime.decoding.sequence import Chunk, Generation
from dspark_runtime.serving.events import Finished, Tokens
from dspark_serve.asking import FINISH_REASONS, Ask, sampling_params, submit, usage, whole_texts
from dspark_serve.conversations import encoded
from dspark_serve.errors import ApiError
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
    prompt = await encoded(served, body.messages, body.chat_template_kwargs)
    most = body.max_completion_tokens or body.max_tokens or max(served.capacity - len(prompt), 1)
    ask = submit(request, body, [prompt], sampling_params(body), most, "chatcmpl")
    if body.stream:
        await ask.channel.begun()
        return EventStream(ask.channel, _Stream(ask, body).events(), ask.headers)
    generations = await whole_texts(ask.channel, request.receive)
    answer = ask.frame("chat.completion") | {
        "choices": [_choice(index, generation) for index, generation in enumerate(generations)],
        "usage": usage(generations, len(generations)),
    }
    return Response(to_json(answer), media_type="application/json", headers=ask.headers)


class _Stream:
    """One streamed answer."""

    def __init__(self, ask: Ask, body: ChatRequest) -> None:
        options = body.stream_options
        self._ask = ask
        self._usage = bool(options and options.include_usage)
        self._drafters = bool(options and options.include_drafters)
        self._frame = ask.frame(_CHUNK) | ({"usage": None} if self._usage else {})

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
        if self._usage:
            generations = [ended[index] for index in sorted(ended)]
            yield event(self._frame | {"choices": [], "usage": usage(generations, len(generations))})

    def _text(self, index: int, chunk: Chunk) -> bytes:
        if not chunk.text and not self._drafters:
            return b""
        return self._part(index, {"content": chunk.text})

    def _part(self, index: int, delta: dict[str, Any], reason: str | None = None) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}
        return event(self._frame | {"choices": [choice]})


def _choice(index: int, generation: Generation) -> dict[str, Any]:
    return {
        "index": index,
        "message": {"role": "assistant", "content": generation.text, "refusal": None},
        "logprobs": None,
        "finish_reason": FINISH_REASONS[generation.finish_reason],
    }


def _check(body: ChatRequest) -> None:
    """ApiError for fields that contradict each other."""
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options are for streams; set stream to true", param="stream_options")
    if body.max_tokens and body.max_completion_tokens and body.max_tokens != body.max_completion_tokens:
        raise ApiError(400, "max_tokens and max_completion_tokens differ; give one of them", param="max_tokens")
