"""Rotary embeddings that transformers would recompute as a text grows, and that are static for texts that fit.

``longrope`` has factors for texts up to the original length and factors for longer ones; every position a bundle
reaches must get the same factors whatever the length. So a bundle ends at the original length, where the two differ.

``dynamic`` changes its base beyond ``max_position_embeddings`` only, which is where a bundle ends.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class ShorterContext(UserWarning):
    """The bundle takes shorter texts than the checkpoint."""


def rope_sets(config: PretrainedConfig) -> Iterator[dict[str, Any]]:
    """The rotary settings of a text config: one set, or one for each kind of layer."""
    given = getattr(config, "rope_parameters", None) or {}
    yield from [value for value in given.values() if isinstance(value, dict)] or [given]


def is_static(parameters: dict[str, Any], positions: int) -> bool:
    """Whether the frequencies are the same at every length up to ``positions``."""
    kind = parameters.get("rope_type", "default")
    if kind == "longrope":
        same = parameters.get("short_factor") == parameters.get("long_factor")
        return same or positions <= (parameters.get("original_max_position_embeddings") or 0)
    return True


def end_at_original_length(config: PretrainedConfig, name: str) -> None:
    """Shorten the context of a LongRoPE model to where its short factors hold; warns, since texts get shorter."""
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    for parameters in rope_sets(text):
        original = parameters.get("original_max_position_embeddings")
        if parameters.get("rope_type") != "longrope" or not positions or not original:
            continue
        if is_static(parameters, positions):
            continue
        if parameters.get("attention_factor") is None:  # follows from the lengths, of which one changes now
            parameters["attention_factor"] = _attention_factor(
                parameters.get("factor") or positions / original, original
            )
        text.max_position_embeddings = int(original)
        warnings.warn(
            f"{name} takes {positions} tokens with LongRoPE, whose factors change beyond {original}: the bundle takes "
            f"texts up to {original} tokens, which are exact",
            ShorterContext,
            stacklevel=2,
        )


def _attention_factor(factor: float, original: int) -> float:
    """transformers' default (``_compute_longrope_parameters``), from the LongRoPE paper."""
    import math

    return 1.0 if factor <= 1.0 else math.sqrt(1 + math.log(factor) / math.log(original))
