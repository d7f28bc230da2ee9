"""The rotary frequencies that the settings of a GGUF file give, as llama.cpp computes them, read without the loader."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def rotary_frequencies(path: Path) -> dict[str, list[Floats]]:
    """Frequencies [rotary / 2] by the setting they follow from, with all that are right: LongRoPE has two sets of them,
    for short and for long texts. {} for a model without rotary embedding."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    arch = fields["general.architecture"]
    own = {name.removeprefix(f"{arch}."): value for name, value in fields.items() if name.startswith(f"{arch}.")}
    if not any(name.startswith("rope.") for name in own):
        return {}
    heads = own["attention.head_count"]
    head = own.get(
        "attention.key_length", own["embedding_length"] // (max(heads) if isinstance(heads, list) else heads)
    )
    rotary = int(own.get("rope.dimension_count", head))
    plain = float(own.get("rope.freq_base", 10000.0)) ** (-np.arange(0, rotary, 2) / rotary)
    factors = [
        tensor.data.astype(np.float64).reshape(-1)
        for tensor in reader.tensors
        if tensor.name in ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
    ]
    found = {"rope.freq_base": [_scaled(plain / one, own, rotary) for one in factors or [np.ones_like(plain)]]}
    if arch.startswith("gemma3"):
        base = float(own.get("rope.freq_base_swa", 10000.0))
        found["rope.freq_base_swa"] = [base ** (-np.arange(0, rotary, 2) / rotary)]
    return found


def _scaled(plain: Floats, own: dict[str, Any], rotary: int) -> Floats:
    kind = own.get("rope.scaling.type", "linear")
    factor = float(own.get("rope.scaling.factor", own.get("rope.scale_linear", 0.0)) or 1.0)
    if kind == "none" or factor == 1.0:
        return plain
    if kind != "yarn":
        return plain / factor
    original = own.get("rope.scaling.original_context_length", own["context_length"])
    base = float(own.get("rope.freq_base", 10000.0))

    def place(turns: float) -> float:
        return rotary * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = max(0, math.floor(place(float(own.get("rope.scaling.yarn_beta_fast", 32.0)))))
    high = min(rotary - 1, math.ceil(place(float(own.get("rope.scaling.yarn_beta_slow", 1.0)))))
    slow = np.clip((np.arange(len(plain)) - low) / max(0.001, high - low), 0, 1)
    return plain / factor * slow + plain * (1 - slow)
