"""Packed weights as docs/sequence-kernels.md lays them out, and the same weights as plain float64 matrices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

Array = np.ndarray[Any, Any]

FLOATS = ("Float32", "Float16", "BFloat16")
BLOCKS = ("Int8", "Int8Minimum", "Int4", "Int4Minimum")
FORMATS = (*FLOATS, *BLOCKS, "W8A8")
_DTYPES = {"Float32": np.float32, "Float16": np.float16, "BFloat16": ml_dtypes.bfloat16}


@dataclass(frozen=True)
class Packed:
    """Inputs after the activations, and W [K, N] in float64."""

    inputs: dict[str, Array]
    matrix: Array


def _columns(a: Array, by: int = 16, value: float = 0) -> Array:
    """Padded at the last axis to a multiple of ``by``."""
    return np.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, -a.shape[-1] % by)], constant_values=value)


def _tiles(a: Array) -> Array:
    """[rows, N] as [tiles, rows, 16]."""
    return np.ascontiguousarray(_columns(a).reshape(a.shape[0], -1, 16).transpose(1, 0, 2))


def pack_floats(form: str, w: Array) -> Packed:
    rounded = w.astype(_DTYPES[form])
    if form != "BFloat16":
        return Packed({"weight": _tiles(rounded)}, rounded.astype(np.float64))
    even = np.pad(_columns(rounded), [(0, w.shape[0] % 2), (0, 0)])
    pairs = even.reshape(len(even) // 2, 2, -1, 16).transpose(2, 0, 3, 1)
    return Packed({"weight": np.ascontiguousarray(pairs)}, rounded.astype(np.float64))


def pack_blocks(form: str, q: Array, scale: Array, minimum: Array) -> Packed:
    """Unsigned integers q [K, N]; scale and minimum [K / block, N]."""
    k, block = len(q), len(q) // len(scale)
    wide = _columns(q)
    if form.startswith("Int8"):
        weight = wide.reshape(k // block, block // 4, 4, -1, 16).transpose(3, 0, 1, 4, 2)
    else:
        halves = wide.reshape(k // block, block // 8, 2, 4, -1, 16).transpose(4, 0, 1, 2, 5, 3)
        weight = halves[:, :, :, 0] | halves[:, :, :, 1] << 4
    inputs = {"weight": np.ascontiguousarray(weight), "scale": _tiles(scale)}
    each_scale, each_minimum = (np.repeat(a.astype(np.float64), block, axis=0) for a in (scale, minimum))
    if form.endswith("Minimum"):
        return Packed(inputs | {"minimum": _tiles(minimum)}, q * each_scale + each_minimum)
    return Packed(inputs, (q.astype(np.float64) - (8 if form == "Int4" else 128)) * each_scale)


def pack_channels(q: Array, scale: Array) -> Packed:
    """Unsigned integers q [K, N] around 128; scale [N]."""
    whole = np.pad(q, [(0, -len(q) % 4), (0, -q.shape[1] % 16)], constant_values=128)
    weight = whole.reshape(len(whole) // 4, 4, -1, 16).transpose(2, 0, 3, 1)
    inputs = {"weight": np.ascontiguousarray(weight), "scale": _columns(scale).reshape(-1, 16)}
    return Packed(inputs, (q.astype(np.float64) - 128) * scale)


def random_weights(rng: np.random.Generator, form: str, k: int, n: int, block: int = 32, half: bool = False) -> Packed:
    if form in FLOATS:
        return pack_floats(form, rng.standard_normal((k, n)).astype(np.float32))
    q = rng.integers(0, 16 if form.startswith("Int4") else 256, (k, n), dtype=np.uint8)
    if form == "W8A8":
        return pack_channels(q, rng.uniform(0.5, 1.5, n).astype(np.float32))
    scales = [rng.uniform(-1.5, 1.5, (k // block, n)).astype(np.float16 if half else np.float32) for _ in range(2)]
    return pack_blocks(form, q, *scales)


def rounded_rows(form: str, x: Array, block: int, limit: float = 0) -> Array:
    """Activations [rows, K] as the product sees them, in float64."""
    if form in FLOATS:
        return x.astype(np.float64)
    parts = x.reshape(len(x), -1, x.shape[1] if form == "W8A8" else block)
    largest = np.abs(parts).max(axis=-1, keepdims=True)
    if limit:
        largest = np.full_like(largest, limit)
    factor = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=largest > 2.0**-100)
    q = np.clip(np.rint(parts * factor), -127, 127)
    return (q.astype(np.float64) * (largest / np.float32(127))).reshape(x.shape)
