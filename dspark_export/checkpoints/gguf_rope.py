"""The rotary embedding that a GGUF file describes, in transformers' terms, as llama.cpp computes it.

llama.cpp: ``theta(i) = position * base^(-2i/n) / factors[i] / factor``; cosine and sine are multiplied by a magnitude.
A file may hold factors per frequency (``rope_freqs``: Llama 3.1 to 3.3; ``rope_factors_long``/``_short``: LongRoPE).
transformers' ``longrope`` takes such factors, and is static where both lists are the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dspark_export.checkpoints.gguf_keys import Keys
from dspark_runtime.errors import InvalidConfig, InvalidWeights

ROPE_FREQS, ROPE_LONG, ROPE_SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
_KINDS = ("none", "linear", "yarn", "longrope")


@dataclass(frozen=True)
class RopeFactors:
    """Divisors of the frequencies [rotary / 2] that the file stores as tensors; None where it has none."""

    all: Sequence[float] | None = None
    long: Sequence[float] | None = None
    short: Sequence[float] | None = None


def rope_parameters(keys: Keys, rotary: int, head: int, context: int, factors: RopeFactors) -> dict[str, Any]:
    """``rope_parameters`` of the config. ``rotary`` of ``head`` dimensions are rotated; ``context`` in tokens."""
    kind = keys.text("rope.scaling.type", "linear")
    if kind not in _KINDS:
        keys.refuse("rope.scaling.type", f"known are {', '.join(_KINDS)}")
    old_factor = keys.number("rope.scale_linear", 0.0)
    factor = keys.number("rope.scaling.factor", old_factor) or 1.0
    original = keys.count("rope.scaling.original_context_length", context)
    magnitude = keys.number("rope.scaling.attn_factor", 1.0) or 1.0
    yarn = _yarn_settings(keys)
    base: dict[str, Any] = {"rope_theta": keys.number("rope.freq_base", 10000.0)}
    if base["rope_theta"] <= 0 or factor <= 0:
        raise InvalidConfig(f"{keys.path}: the base and the scaling factor of the rotary embedding must be positive")
    if rotary != head:
        base["partial_rotary_factor"] = rotary / head
    if kind == "none":
        factor = 1.0
    longest = original * factor if kind == "yarn" else context
    lists = _per_frequency(keys, rotary, factors, longest > original or kind == "longrope")
    if kind == "yarn":
        if lists is not None:
            raise InvalidWeights(f"{keys.path} has rotary factors as tensors and YaRN scaling; download it again")
        magnitude *= 1.0 + 0.1 * math.log(factor)
        settings = {"factor": factor, "original_max_position_embeddings": original, "attention_factor": magnitude}
        return {**base, "rope_type": "yarn", **settings, **yarn}
    if lists is None and factor == 1.0 and magnitude == 1.0:
        return {**base, "rope_type": "default"}
    if lists is None and magnitude == 1.0:
        return {**base, "rope_type": "linear", "factor": factor}
    short, long = lists or ([1.0] * (rotary // 2),) * 2
    return {
        **base,
        "rope_type": "longrope",
        "factor": 1.0,
        "short_factor": [value * factor for value in short],
        "long_factor": [value * factor for value in long],
        "original_max_position_embeddings": original,
        "attention_factor": magnitude,
    }


def _yarn_settings(keys: Keys) -> dict[str, float]:
    """YaRN's ramp. What readers of GGUF files take differently is refused: the share and the magnitude of the ramp."""
    for name in ("rope.scaling.yarn_ext_factor", "rope.scaling.yarn_attn_factor"):
        if keys.number(name, 1.0) != 1.0:
            keys.refuse(name, "programs that read GGUF files disagree on what this means at any value but 1")
    names = {"beta_fast": 32.0, "beta_slow": 1.0}
    return {name: keys.number(f"rope.scaling.yarn_{name}", default) for name, default in names.items()}


def _per_frequency(
    keys: Keys, rotary: int, factors: RopeFactors, beyond: bool
) -> tuple[Sequence[float], Sequence[float]] | None:
    """Divisors for short and for long texts; None where the file has none."""
    for name, values in ((ROPE_FREQS, factors.all), (ROPE_LONG, factors.long), (ROPE_SHORT, factors.short)):
        if values is None:
            continue
        if len(values) != rotary // 2:
            raise InvalidWeights(f"{keys.path}: {name} has {len(values)} values, {rotary // 2} frequencies are rotated")
        if not all(math.isfinite(value) and value > 0 for value in values):
            raise InvalidWeights(f"{keys.path}: {name} must hold positive finite numbers")
    if factors.all is not None:
        return factors.all, factors.all
    if factors.short is None and factors.long is None:
        return None
    if factors.short is None or (factors.long is None and beyond):
        raise InvalidWeights(f"{keys.path} has only one of {ROPE_LONG} and {ROPE_SHORT}; download it again")
    return factors.short, factors.long if factors.long is not None else factors.short
