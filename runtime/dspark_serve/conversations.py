"""Conversations of the HTTP interface as chat templates know them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from pydantic import BaseModel

from dspark_runtime.errors import DsparkError
from dspark_serve.errors import ApiError, from_runtime
from dspark_serve.serving import Served

_RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt"})
_NOT_FOR_TEMPLATES = ("role", "content", "refusal", "annotations")


async def encoded(
    served: Served,
    messages: Sequence[BaseModel],
    variables: Mapping[str, Any] | None,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> list[int]:
    """Token ids of a conversation up to where the answer begins.

    Raises:
        ApiError: the messages or the variables do not fit the model's template.
    """
    given = dict(variables or {})
    if reserved := _RESERVED & given.keys():
        name = min(reserved)
        raise ApiError(400, f"{name!r} cannot be set as a variable of the chat template", param="chat_template_kwargs")
    if tools:
        given["tools"] = list(tools)
    plain = [_message(message.model_dump(exclude_none=True)) for message in messages]
    try:
        return await served.on_text_thread(lambda: served.codec.encode_chat(plain, **given))
    except DsparkError as error:
        raise from_runtime(error, default_param="messages") from error


def _message(data: dict[str, Any]) -> dict[str, Any]:
    """A message with its content as one text, and ``developer`` by its older name."""
    content = data.get("content", "")
    for call in data.get("tool_calls", ()):  # templates write arguments as JSON, and so have to be given an object
        call.pop("index", None)
        with suppress(ValueError):
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    return {
        "role": "system" if data["role"] == "developer" else data["role"],
        "content": content if isinstance(content, str) else "\n".join(part["text"] for part in content),
        **{name: value for name, value in data.items() if name not in _NOT_FOR_TEMPLATES},
    }
