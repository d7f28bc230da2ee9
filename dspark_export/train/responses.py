"""Responses of the target: token ids of prompts and answers in a file of JSON lines, and which of them are held out.

Text that the target did not write teaches a drafter little: it has to predict the target, not the world.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from dspark_export.prompts.answers import Response
from dspark_runtime.errors import UsageError

EVERY = 32
"""One prompt in this many is held out of training."""


class ResponseFile:
    """Responses in a file of JSON lines, ``prompt``, ``response`` and ``temperature`` each."""

    def __init__(self, path: Path, read_only: bool = False) -> None:
        self.path = path
        if not read_only:
            drop_torn_line(path)

    def __iter__(self) -> Iterator[Response]:
        if not self.path.exists():
            return
        with self.path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                yield _parse(line, f"{self.path}:{number}")

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def append(self, responses: Sequence[Response]) -> None:
        """Add lines at the end."""
        with self.path.open("a", encoding="utf-8") as file:
            for item in responses:
                fields = {"prompt": item.prompt, "response": item.response, "temperature": item.temperature}
                file.write(json.dumps(fields) + "\n")


def drop_torn_line(path: Path) -> None:
    """Cut what a killed run left behind the last complete line."""
    if path.exists():
        with path.open("rb+") as file:
            file.truncate(file.read().rfind(b"\n") + 1)


def _parse(line: str, where: str) -> Response:
    try:
        fields = json.loads(line)
        prompt, response = (tuple(int(t) for t in fields[name]) for name in ("prompt", "response"))
        return Response(prompt, response, float(fields.get("temperature", 0.0)))
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{where} is not a response ({error}); give JSON lines of prompt and response, both token ids"
        ) from error


def split(responses: Iterable[Response], held_out: int) -> tuple[list[Response], list[Response]]:
    """Responses to learn from and to judge by: of every 32 prompts one is kept apart, and ``held_out`` of those judge.

    What goes where follows from the prompt alone, so it does not change when responses are added. Drafters are judged
    by greedy responses only.
    """
    learn: list[Response] = []
    judge: list[Response] = []
    for item in responses:
        if teaches(item):
            learn.append(item)
        elif item.temperature == 0 and len(judge) < held_out:
            judge.append(item)
    return learn, judge


def teaches(item: Response) -> bool:
    """Whether a response is learnt from; the others may judge."""
    return prompt_number(item.prompt) % EVERY != 0


def prompt_number(prompt: Sequence[int]) -> int:
    """A number that follows from the prompt alone."""
    return zlib.crc32(np.asarray(prompt, "<i4").tobytes())
