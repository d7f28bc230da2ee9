"""Formatting of text in chat templates, with bounds on what it makes: ``%``, ``str.format`` and JSON.

Widths and precisions are part of the format: ``'%999999999d' % 1`` is a gigabyte. They are checked before formatting.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jinja2.sandbox import SandboxedEnvironment, SandboxedFormatter

from dspark_runtime.errors import ChatTemplateError
from dspark_runtime.text.template_limits import Budget

_MOST_INDENT = 32
_DIGITS = re.compile(r"\d+")
_FLAGS = "-+ #0"


def check_percent(pattern: str | bytes, values: Any, budget: Budget) -> None:
    """Check what ``pattern % values`` makes; raises ChatTemplateError if it may be too much."""
    text = pattern.decode("latin-1") if isinstance(pattern, bytes) else pattern
    widest, conversions = 0, 0
    for widths in _conversions(text):
        conversions += 1
        if "*" in widths:
            widest = max([widest, *(abs(v) for v in _values(values) if isinstance(v, int))])
        widest = max([widest, *(int(width) for width in widths if width.isdecimal())])
    budget.check_size(widest)
    budget.check_room(len(text) + conversions * (widest + budget.text_bound(values)))


def _values(values: Any) -> Sequence[Any]:
    return values if isinstance(values, tuple) else (values,)


def _conversions(text: str) -> Iterator[tuple[str, str]]:
    """Width and precision of every conversion of a %-format, as Python reads it: digits, ``*`` or nothing."""
    place = text.find("%")
    while 0 <= place < len(text):
        place += 1
        if text[place : place + 1] == "(":
            depth = 0
            while place < len(text):  # a name may hold parentheses, and percent signs
                depth += (text[place] == "(") - (text[place] == ")")
                place += 1
                if depth == 0:
                    break
        while place < len(text) and text[place] in _FLAGS:
            place += 1
        width, place = _number(text, place)
        precision = ""
        if text[place : place + 1] == ".":
            precision, place = _number(text, place + 1)
        yield width, precision
        place = text.find("%", place + (text[place : place + 1] == "%"))


def _number(text: str, place: int) -> tuple[str, int]:
    if text[place : place + 1] == "*":
        return "*", place + 1
    end = place
    while end < len(text) and text[end].isdecimal() and text[end].isascii():
        end += 1
    return text[place : min(end, place + 18)], end


class BoundedFormatter(SandboxedFormatter):
    """``str.format`` in the sandbox, with every field and their sum bounded."""

    def __init__(self, environment: SandboxedEnvironment, budget: Budget) -> None:
        super().__init__(environment)
        self._budget, self._size = budget, 0

    def format_field(self, value: Any, format_spec: str) -> Any:
        """Format one field, after a look at its width and precision."""
        self._budget.turn()
        for digits in _DIGITS.findall(format_spec):
            self._budget.check_size(int(digits[:18]))
        self._budget.check(value)
        text = super().format_field(value, format_spec)
        self._size += len(text)
        self._budget.check_size(self._size)
        return text

    def convert_field(self, value: Any, conversion: Any) -> Any:
        """``!r``, ``!s`` and ``!a``."""
        self._budget.check(value)
        return super().convert_field(value, conversion)


def bounded_format(environment: SandboxedEnvironment, budget: Budget, method: Any) -> Callable[..., str]:
    """In place of ``text.format`` or ``text.format_map``."""

    def formatted(*args: Any, **kwargs: Any) -> str:
        formatter = BoundedFormatter(environment, budget)
        if method.__name__ != "format_map":
            return str(formatter.vformat(method.__self__, args, kwargs))
        if len(args) != 1 or kwargs:
            raise TypeError("format_map() takes exactly one argument")
        return str(formatter.vformat(method.__self__, (), args[0]))

    return formatted


def to_json(
    budget: Budget,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as transformers' templates have it: not escaped for HTML, unlike jinja's own filter."""
    width = len(indent) if isinstance(indent, str) else max(0, indent or 0)
    if width > _MOST_INDENT:
        raise ChatTemplateError(f"the chat template asks tojson for an indent of {width}; at most {_MOST_INDENT}")
    longest = max((len(text) for text in separators or ()), default=0)
    budget.check_size(longest)
    budget.check_room(budget.text_bound(value, width + longest))
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
