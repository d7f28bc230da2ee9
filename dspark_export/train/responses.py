"""Responses of the target: token ids of prompts and answers in files, and which of them are held out.

Text that the target did not write teaches a drafter little: it has to predict the target, not the world.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from dspark_export.prompts.answers import Response
from dspark_export.prompts.packed import PackedResponses, is_packed
from dspark_runtime.errors import UsageError

EVERY = 32
"""One prompt in this many is held out of training."""


def read_responses(path: Path) -> Iterator[Response]:
    """Responses of a file: packed ones, or JSON lines with ``prompt``, ``response`` and ``temperature`` (default: 0).

    Raises UsageError if there is no such file, or it holds something else.
    """
    if not path.is_file():
        raise UsageError(f"--responses {path}: no such file")
    if is_packed(path):
        yield from PackedResponses(path)
        return
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            yield _parse(line, f"{path}:{number}")


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
