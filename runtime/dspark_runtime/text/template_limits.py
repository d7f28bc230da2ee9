"""Limits on what a chat template may do, and how much of them one rendering has used."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from jinja2.utils import Namespace

from dspark_runtime.errors import ChatTemplateError

_ROOM = 16  # a text on its way may take this many times the largest result: JSON and repr escape characters


@dataclass(frozen=True)
class TemplateLimits:
    """Bounds of one rendering: characters of the template, of any text it makes and of all its output, parts of any
    value it makes, loop turns, seconds."""

    template_chars: int = 512_000
    output_chars: int = 4_000_000
    values: int = 200_000
    loop_turns: int = 500_000
    seconds: float = 5.0


class Budget:
    """What one rendering may still spend. Every method that checks raises ChatTemplateError."""

    def __init__(self, limits: TemplateLimits) -> None:
        self._limits = limits
        self._turns = 0
        self._emitted = 0
        self._deadline = time.monotonic() + limits.seconds

    def turn(self) -> None:
        """Count a loop turn, an operation or a call, and look at the clock."""
        self._turns += 1
        if self._turns > self._limits.loop_turns:
            raise ChatTemplateError(f"the chat template made more than {self._limits.loop_turns} loop turns or calls")
        if time.monotonic() > self._deadline:
            raise ChatTemplateError(f"the chat template ran longer than {self._limits.seconds} seconds")

    def check_size(self, size: int) -> None:
        """Check the number of characters of a text before it is made, or of the output."""
        if size > self._limits.output_chars:
            raise ChatTemplateError(f"the chat template made more than {self._limits.output_chars} characters of text")

    def check_room(self, bound: int) -> None:
        """Check an upper bound of a text whose size is only known once it is made."""
        self.check_size(bound // _ROOM)

    def check(self, value: Any) -> Any:
        """Check a value the template made, and return it."""
        if isinstance(value, str | bytes):
            self.check_size(len(value))
        elif isinstance(value, list | tuple | dict):
            self.check_room(self.text_bound(value))
        elif isinstance(value, int) and not isinstance(value, bool):
            self.check_size(value.bit_length())
        return value

    def emit(self, size: int) -> None:
        """Count characters of the output."""
        self._emitted += size
        self.check_size(self._emitted)

    def text_bound(self, value: Any, indent: int = 0) -> int:
        """About how many characters ``value`` has when it is written out, each level indented by ``indent``.

        A value is counted with everything in it: lists that hold each other twice grow exponentially.
        """
        pending, seen, size = [(value, 1)], 0, 0
        while pending:
            inner, depth = pending.pop()
            if isinstance(inner, Namespace):
                inner = inner._Namespace__attrs  # its dict of attributes, which repr writes
            seen += 1
            size += 4 + indent * depth
            if isinstance(inner, str | bytes):
                size += len(inner)
            elif isinstance(inner, dict):
                pending.extend((part, depth + 1) for part in inner.values())
                size += sum(len(key) if isinstance(key, str) else 20 for key in inner)
            elif isinstance(inner, list | tuple):
                pending.extend((part, depth + 1) for part in inner)
            else:
                size += inner.bit_length() // 3 if isinstance(inner, int) else 100
            if seen > self._limits.values:
                raise ChatTemplateError(f"the chat template made a value with more than {self._limits.values} parts")
        return size
