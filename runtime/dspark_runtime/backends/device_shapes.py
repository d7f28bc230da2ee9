"""Chooses the shape that a requested pass runs in: the profile, and how far to pad.

Passes of similar shapes share one CUDA graph. Padding rows are token 0, see slot 0 only and write after the real rows,
where the next pass overwrites them; padding columns of the mask are false.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from dspark_runtime.bundle.engine_entry import EngineProfile
from dspark_runtime.errors import EngineRangeExceeded

_KV_PIECES = 16
_KV_STEP = 64


class PassRanges(Protocol):
    """What a plan takes: a :class:`~dspark_runtime.bundle.engine_entry.EngineEntry`, or a graph's chosen ranges."""

    @property
    def graph(self) -> str:
        """Name of the graph."""

    @property
    def dtype(self) -> str:
        """Element type of its caches."""

    @property
    def capacity(self) -> int:
        """Cache slots of a sequence, a constant."""

    @property
    def profiles(self) -> Sequence[EngineProfile]:
        """Ranges of its other dimensions."""


@dataclass(frozen=True)
class PassShape:
    """Sizes of one pass as it runs, and the profile that accepts it. ``replayed``: worth a CUDA graph."""

    profile: int
    batch: int
    tokens: int
    rows: int
    kv_len: int
    replayed: bool


def pass_shape(engine: PassRanges, batch: int, tokens: int, rows: int, kv_len: int) -> PassShape:
    """The shape for ``tokens`` new rows of ``batch`` sequences, ``rows`` logits each, over ``kv_len`` slots.

    Raises:
        EngineRangeExceeded: no profile of ``engine`` takes it.
    """
    wanted = {"batch": batch, "tokens": tokens, "rows": rows, "kv_len": kv_len}
    number = profile_for(engine, wanted)
    profile = engine.profiles[number]
    most = {name: bounds[2] for name, bounds in profile.dims.items()}
    if profile.name == "prefill":
        return PassShape(number, batch, tokens, rows, kv_len, False)
    padded = _power_of_two(tokens, most["tokens"])
    if kv_len - tokens + padded > engine.capacity:  # padding rows would be written past the end of the cache
        padded = tokens
    logits = padded if rows == tokens else _power_of_two(rows, most["rows"])
    slots = max(kv_len, kv_len - tokens + padded)
    return PassShape(number, batch, padded, min(logits, most["rows"]), _kv_bucket(slots, engine.capacity), True)


def largest_sizes(ranges: PassRanges) -> dict[str, int]:
    """Largest size of every dimension over all profiles."""
    most: dict[str, int] = {}
    for profile in ranges.profiles:
        for name, (_, _, high) in profile.dims.items():
            most[name] = max(high, most.get(name, 0))
    return most


def profile_for(engine: PassRanges, sizes: dict[str, int]) -> int:
    """The first profile that takes dimensions of these ``sizes``; EngineRangeExceeded if none does."""
    for number, profile in enumerate(engine.profiles):
        if all(size <= profile.dims[name][2] for name, size in sizes.items() if name in profile.dims):
            return number
    raise EngineRangeExceeded(_message(engine, sizes))


def _power_of_two(count: int, most: int) -> int:
    return min(1 << (count - 1).bit_length(), most)


def _kv_bucket(slots: int, capacity: int) -> int:
    """``slots`` rounded up to one of at most 16 lengths."""
    step = -(-capacity // (_KV_PIECES * _KV_STEP)) * _KV_STEP
    return min(-(-slots // step) * step, capacity)


def _message(engine: PassRanges, wanted: dict[str, int]) -> str:
    ranges = "; ".join(
        f"{profile.name}: " + ", ".join(f"{name} to {profile.dims[name][2]}" for name in wanted if name in profile.dims)
        for profile in engine.profiles
    )
    asked = ", ".join(f"{name} {value}" for name, value in wanted.items())
    return (
        f"a pass of {asked} is more than the engine of {engine.graph} takes ({ranges}); compile the "
        "bundle again with a larger --batch, --verify-rows, --chunk or --max-length"
    )
