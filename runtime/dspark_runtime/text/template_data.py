"""What a chat template sees of the caller's data: plain dicts, lists, strings and numbers, nothing with methods.

As in transformers: fields that are None are left out of a message, the various names of the reasoning field are
aliases, and anything that is not data (an image, a tensor) becomes the name of its type.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dspark_runtime.errors import UsageError

_REASONING = ("reasoning_content", "thinking", "reasoning")  # the first is the standard one
_DEEPEST = 200


def plain_messages(messages: Sequence[Any]) -> list[dict[str, Any]]:
    """Messages (mappings, dataclasses, pydantic models) as plain dicts; UsageError for anything else."""
    if isinstance(messages, str | bytes | Mapping) or not hasattr(messages, "__iter__"):
        raise UsageError(
            f"messages are a list of {{'role': ..., 'content': ...}}, not {_article(type(messages).__name__)}"
        )
    plain = []
    for place, message in enumerate(messages):
        data = plain_data(message)
        if not isinstance(data, dict):
            raise UsageError(f"message {place} is {_article(type(message).__name__)}, not a mapping with a role")
        fields = {key: value for key, value in data.items() if value is not None}
        reasoning = next((fields[name] for name in _REASONING if name in fields), None)
        if reasoning is not None:
            fields = {"thinking": reasoning, **fields, "reasoning_content": reasoning}
        plain.append(fields)
    return plain


def plain_variables(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Template variables as plain data; UsageError for tools or documents that are not lists of mappings."""
    for name in ("tools", "documents"):
        given = variables.get(name)
        if given is None:
            continue
        if isinstance(given, str | bytes | Mapping) or not isinstance(given, Sequence):
            raise UsageError(f"{name} are a list of mappings, not {_article(type(given).__name__)}")
        for place, item in enumerate(given):
            if not isinstance(plain_data(item), dict):
                raise UsageError(
                    f"{name}[{place}] is {_article(type(item).__name__)}, not a mapping; "
                    "describe a tool by its JSON schema: {'type': 'function', 'function': {'name': ...}}"
                )
    return {name: plain_data(value) for name, value in variables.items()}


def plain_data(value: Any, depth: int = 0) -> Any:
    """``value`` rebuilt from JSON's types and tuples; UsageError for data that is nested too deeply, or in itself."""
    if depth > _DEEPEST:
        raise UsageError(f"messages and template variables may be nested {_DEEPEST} deep; these go deeper")
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):  # of a subclass, what it holds
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, bytes | bytearray):
        try:
            return bytes(value).decode("utf-8")
        except UnicodeDecodeError as error:
            raise UsageError(f"a text is not valid UTF-8: {error.reason} at byte {error.start}") from error
    deeper = depth + 1
    if isinstance(value, Mapping):
        return {plain_data(key, deeper): plain_data(inner, deeper) for key, inner in value.items()}
    if isinstance(value, list):
        return [plain_data(inner, deeper) for inner in value]
    if isinstance(value, tuple):
        return tuple(plain_data(inner, deeper) for inner in value)
    if isinstance(value, np.generic):
        return plain_data(value.item(), deeper)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain_data(getattr(value, f.name), deeper) for f in dataclasses.fields(value)}
    if callable(dump := getattr(value, "model_dump", None)):
        return plain_data(dump(), deeper)
    return f"<{type(value).__name__}>"


def _article(word: str) -> str:
    return f"{'an' if word[:1].lower() in 'aeiou' else 'a'} {word}"
