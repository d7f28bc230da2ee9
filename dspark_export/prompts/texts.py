"""Turns a prompt into token ids, and finds where two texts diverge."""

from __future__ import annotations

from collections.abc import Sequence

from dspark_runtime import Bundle
from dspark_runtime.errors import ChatTemplateError

PLAIN = "off"
"""The mode that other modes are compared with."""


def encode(bundle: Bundle, text: str) -> list[int]:
    """Token ids of a user's message; of the text alone if the model has no usable chat template."""
    try:
        _ = bundle.codec.template
    except ChatTemplateError:
        return bundle.codec.encode(text)
    return bundle.codec.encode_chat([{"role": "user", "content": text}])


def first_difference(left: Sequence[int], right: Sequence[int]) -> int | None:
    """Index of the first token that differs, the shorter length if one text is the other's beginning, None if equal."""
    for position, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return position
    return None if len(left) == len(right) else min(len(left), len(right))
