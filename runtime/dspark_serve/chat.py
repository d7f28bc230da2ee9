"""``POST /v1/chat/completions``."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from pydantic_core import to_json
from starlette.responses import Response

from dspark_runtime.decoding.sequence import Chunk, Generation
from dspark_runtime.serving.events import Finished, Tokens
from dspark_serve.asking import (
    FINISH_REASONS,
    Ask,
    grammar_of,
    guide_headers,
    guide_report,
    sampling_params,
    submit,
    usage,
    whole_texts,
)
from dspark_serve.conversations import encoded
from dspark_serve.errors import ApiError
from dspark_serve.guides import Grammar
from dspark_serve.logprobs import TokenBytes, chat_logprobs, spoken_logprobs
from dspark_serve.routes import ANSWERS, STREAMED, StrictRoute, served_by
from dspark_serve.schemas import ChatCompletion, ChatRequest, NamedTool
from dspark_serve.serving import Served
from dspark_serve.sse import EventStream, event
from dspark_serve.tools import ToolFormat, ToolText, as_delta, as_message, forced_calls

router = APIRouter(route_class=StrictRoute, responses=ANSWERS)

_CHUNK = "chat.completion.chunk"


@router.post("/v1/chat/completions", response_model=ChatCompletion, responses=STREAMED)
async def chat(body: ChatRequest, request: Request) -> Response:
    """Answer a conversation."""
    served = served_by(request)
    served.check_model(body.model)
    _check(body)
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs need logprobs; set it to true", param="top_logprobs")
    logprobs = body.top_logprobs or 0 if body.logprobs else None
    tools = await tools_of(served, body)
    params = await sampling_params(served, body, logprobs, tools.forced)
    prompt = await encoded(served, body.messages, body.chat_template_kwargs, tools.shown)
    most = body.max_completion_tokens or body.max_tokens or max(served.capacity - len(prompt), 1)
    token_bytes = None if logprobs is None else await served.grammars.token_bytes()
    ask = submit(request, body, [prompt], params, most, "chatcmpl")
    if body.stream:
        await ask.channel.begun()
        return EventStream(ask.channel, _Stream(ask, token_bytes, tools.readers(ask)).events(), ask.headers)
    generations = await whole_texts(ask.channel, request.receive)
    readers = tools.readers(ask)
    answer = ask.frame("chat.completion") | {
        "choices": [_choice(index, generation, token_bytes, readers) for index, generation in enumerate(generations)],
        "usage": usage(generations, len(generations)),
    }
    return Response(to_json(answer), media_type="application/json", headers=ask.headers | guide_headers(generations))


class _Stream:
    """One streamed answer."""

    def __init__(self, ask: Ask, token_bytes: TokenBytes | None, readers: Sequence[ToolText]) -> None:
        self._ask, self._token_bytes, self._readers = ask, token_bytes, readers
        self._frame = ask.frame(_CHUNK) | ({"usage": None} if ask.with_usage else {})
        self._reports, self._split = ask.draft_reports(), ask.chunk_splitter()

    async def events(self) -> AsyncIterator[bytes]:
        ask, ended = self._ask, dict[int, Generation]()
        yield b"".join(self._part(index, {"role": "assistant", "content": ""}) for index in ask.choices)
        while items := await ask.channel.read():
            parts = []
            for index, heard in items:
                if isinstance(heard, Tokens):
                    parts += [self._text(index, chunk) for chunk in self._split(index, heard.chunk)]
                elif isinstance(heard, Finished):
                    ended[index] = heard.generation
                    reason = _finish_reason(heard.generation, self._readers[index] if self._readers else None)
                    parts.append(self._part(index, {}, reason, guide_report(heard.generation)))
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
        if not self._readers:
            return self._part(index, {"content": chunk.text}, None, more) if chunk.text or more else b""
        deltas = [as_delta(piece) for piece in self._readers[index].read(chunk.tokens, chunk.finish_reason)]
        if more:
            deltas = deltas or [{}]
        return b"".join(self._part(index, delta, None, {} if place else more) for place, delta in enumerate(deltas))

    def _part(
        self, index: int, delta: dict[str, Any], reason: str | None = None, more: Mapping[str, Any] | None = None
    ) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason, **(more or {})}
        return event(self._frame | {"choices": [choice]})


def _choice(
    index: int, generation: Generation, token_bytes: TokenBytes | None, readers: Sequence[ToolText]
) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": generation.text, "refusal": None}
    reader = readers[index] if readers else None
    if reader is not None:
        message = as_message(reader.read(generation.tokens, generation.finish_reason))
    found = spoken_logprobs(generation.logprobs, generation.finish_reason)
    return {
        "index": index,
        "message": message,
        "logprobs": None if token_bytes is None else chat_logprobs(found, token_bytes),
        "finish_reason": _finish_reason(generation, reader),
    } | guide_report(generation)


def _finish_reason(generation: Generation, reader: ToolText | None) -> str:
    reason = FINISH_REASONS[generation.finish_reason]
    return "tool_calls" if reason == "stop" and reader is not None and reader.called else reason


@dataclass(frozen=True)
class _Tools:
    """What a request says of tools: those the template shows, how calls are read, and whether they must come."""

    form: ToolFormat | None = None
    shown: tuple[dict[str, Any], ...] = ()
    forced: Grammar | None = None

    def readers(self, ask: Ask) -> list[ToolText]:
        """One for each choice; none where nothing can be called."""
        tokenizer = ask.served.codec.tokenizer
        handles = ask.channel.handles if self.form is not None else []
        return [ToolText(self.form, handle.request, tokenizer) for handle in handles if self.form is not None]


async def tools_of(served: Served, body: ChatRequest) -> _Tools:
    """Check the fields about tools.

    Raises:
        ApiError: they contradict each other, or the model knows no tools.
    """
    choice = body.tool_choice or "auto"
    if not body.tools:
        if body.tool_choice not in (None, "none", "auto"):
            raise ApiError(400, "tool_choice asks for a call, and there are no tools", param="tool_choice")
        return _Tools()
    if choice == "none":
        return _Tools()
    if grammar_of(body) is not None:
        raise ApiError(400, "tools and a format of the answer exclude each other; set tool_choice none", param="tools")
    form = await served.tool_format()
    shown = tuple(tool.model_dump(exclude_none=True) for tool in body.tools)
    functions = [tool["function"] for tool in shown]
    if choice == "auto":
        return _Tools(form, shown)
    if isinstance(choice, NamedTool):
        functions = [function for function in functions if function["name"] == choice.function.name]
        if not functions:
            message = f"tool_choice names {choice.function.name!r}, which is not one of the tools"
            raise ApiError(400, message, param="tool_choice")
    several = choice == "required" and body.parallel_tool_calls is not False
    return _Tools(form, shown, forced_calls(form, functions, several, served.codec.tokenizer))


def _check(body: ChatRequest) -> None:
    """ApiError for fields that contradict each other."""
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options are for streams; set stream to true", param="stream_options")
    if body.max_tokens and body.max_completion_tokens and body.max_tokens != body.max_completion_tokens:
        raise ApiError(400, "max_tokens and max_completion_tokens differ; give one of them", param="max_tokens")
