"""Which layers a self-draft runs: parsing and checking ``--self-draft layers=...``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

from dspark_runtime.errors import UsageError

FORMS = "a prefix (0-9), a list (0,1,2,5-8) or every k-th layer (every=2)"

_ITEM = re.compile(r"(\d+)(?:-(\d+))?")


def parse_layers(text: str, num_layers: int) -> tuple[int, ...]:
    """Layer numbers of a model with ``num_layers`` layers, ascending, from one of the :data:`FORMS`.

    ``every=k`` keeps layers 0, k, 2k, ... and always the last one, which prepares the hidden state for the head.

    Raises:
        UsageError: not one of the forms, or layers the model does not have.
    """
    text = text.strip()
    if text.startswith("every="):
        return _every(text.removeprefix("every="), num_layers)
    layers: list[int] = []
    for item in text.split(","):
        match = _ITEM.fullmatch(item.strip())
        if match is None:
            raise UsageError(f"layers={text}: {item.strip()!r} is not understood; give {FORMS}")
        first = int(match[1])
        last = int(match[2]) if match[2] else first
        if last < first:
            raise UsageError(f"layers={text}: the range {item.strip()} runs backwards; give {last}-{first}")
        check_layers([first, last] if last > first else [first], num_layers)
        layers.extend(range(first, last + 1))
    return check_layers(layers, num_layers)


def _every(text: str, num_layers: int) -> tuple[int, ...]:
    if not text.isdecimal() or not 1 < int(text) <= num_layers:
        raise UsageError(f"every={text}: k must be a whole number from 2 to {num_layers}, the model's layers")
    return tuple(sorted({*range(0, num_layers, int(text)), num_layers - 1}))


def check_layers(layers: Sequence[int], num_layers: int) -> tuple[int, ...]:
    """``layers`` as a tuple, if it names at least one and only existing layers, each once and in ascending order.

    Raises:
        UsageError: otherwise.
    """
    if not layers:
        raise UsageError(f"a self-draft needs at least one layer; give {FORMS}")
    missing = [n for n in layers if not 0 <= n < num_layers]
    if missing:
        raise UsageError(f"self-draft layers {missing} do not exist: the model has layers 0 to {num_layers - 1}")
    if any(b <= a for a, b in pairwise(layers)):
        raise UsageError(f"self-draft layers {list(layers)} must be ascending and without repeats")
    return tuple(layers)


def describe_layers(layers: Sequence[int]) -> str:
    """The shortest list form of ``layers``: ``0-9,12``."""
    runs: list[list[int]] = []
    for n in layers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
