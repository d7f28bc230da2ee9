"""The integers of GGUF's block types, as they are stored: ``d * q`` or ``d * q + m``, with q of at most 8 bits.

A row of a tensor is a row of blocks; each reader takes blocks [n, bytes] and returns q [n, weights], d [n, sub-blocks]
and m like d, or None. Layouts are those of ggml (``ggml-common.h``). Types whose values come from a table of vectors
(IQ1 to IQ3) have no such integers, and types that are ternary or of 4-bit floats are not read here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from dspark_export.grids import Grid, NotHeld

Octets = npt.NDArray[np.uint8]
Array = npt.NDArray[Any]
Blocks = tuple[Array, Array, Array | None]

_IQ4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8)


def grid_of(kind: str, data: Octets, shape: tuple[int, int]) -> Grid:
    """The integers of a tensor [out, in] of ``kind``, from its bytes; NotHeld for kinds without."""
    if kind not in READERS:
        raise NotHeld(f"{kind} has no integers with a scale")
    out, inputs = shape
    size, reader = READERS[kind]
    codes, scale, minimum = reader(data.reshape(-1, size))
    by_row = [None if part is None else part.reshape(out, -1) for part in (scale, minimum)]
    assert by_row[0] is not None
    return Grid(codes.reshape(out, inputs), by_row[0], minimum=by_row[1])


def _half(blocks: Octets, at: int) -> Array:
    """A float16 of every block, as float32 [n, 1]."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16).astype(np.float32)


def _fields(octets: Octets, bits: int, run: int) -> Octets:
    """Fields of ``bits`` bits: of each ``run`` bytes the lowest, then the next, and so on."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    fields: Octets = (octets.reshape(len(octets), -1, 1, run) >> shifts) & np.uint8(2**bits - 1)
    return fields.reshape(len(octets), -1)


def _q4_0(blocks: Octets) -> Blocks:
    return _fields(blocks[:, 2:], 4, 16).astype(np.int8) - np.int8(8), _half(blocks, 0), None


def _q4_1(blocks: Octets) -> Blocks:
    return _fields(blocks[:, 4:], 4, 16), _half(blocks, 0), _half(blocks, 2)


def _fifth(octets: Octets) -> Octets:
    """Bit j of 32 is the fifth of weight j."""
    return np.unpackbits(octets, axis=1, bitorder="little") << np.uint8(4)


def _q5_0(blocks: Octets) -> Blocks:
    codes = _fields(blocks[:, 6:], 4, 16) | _fifth(blocks[:, 2:6])
    return codes.astype(np.int8) - np.int8(16), _half(blocks, 0), None


def _q5_1(blocks: Octets) -> Blocks:
    return _fields(blocks[:, 8:], 4, 16) | _fifth(blocks[:, 4:8]), _half(blocks, 0), _half(blocks, 2)


def _q8_0(blocks: Octets) -> Blocks:
    return blocks[:, 2:].view(np.int8), _half(blocks, 0), None


def _q2_k(blocks: Octets) -> Blocks:
    scales = blocks[:, :16]
    wide = (_half(blocks, 80) * (scales & 15).astype(np.float32), _half(blocks, 82) * (scales >> 4).astype(np.float32))
    return _fields(blocks[:, 16:80], 2, 32), wide[0], -wide[1]


def _q3_k(blocks: Octets) -> Blocks:
    low, high = _fields(blocks[:, 96:104], 4, 8), _fields(blocks[:, 104:108], 2, 4)
    scales = (low | high << np.uint8(4)).astype(np.int8) - np.int8(32)
    above = _fields(blocks[:, :32], 1, 32).astype(np.int8)  # 0 takes 4 away
    codes = _fields(blocks[:, 32:96], 2, 32).astype(np.int8) - (np.int8(1) - above) * np.int8(4)
    return codes, _half(blocks, 108) * scales.astype(np.float32), None


def _scales_and_minima(blocks: Octets) -> tuple[Array, Array]:
    """Of Q4_K and Q5_K: eight of 6 bits each in 12 bytes, those of the last four in pieces."""
    first, second, third = (blocks[:, at : at + 4] for at in (4, 8, 12))
    scales = np.concatenate([first & 63, third & 15 | first >> 2 & 48], axis=1)
    minima = np.concatenate([second & 63, third >> 4 | second >> 2 & 48], axis=1)
    return _half(blocks, 0) * scales.astype(np.float32), -(_half(blocks, 2) * minima.astype(np.float32))


def _q4_k(blocks: Octets) -> Blocks:
    return _fields(blocks[:, 16:], 4, 32), *_scales_and_minima(blocks)


def _q5_k(blocks: Octets) -> Blocks:
    codes = _fields(blocks[:, 48:], 4, 32) | _fields(blocks[:, 16:48], 1, 32) << np.uint8(4)
    return codes, *_scales_and_minima(blocks)


def _q6_k(blocks: Octets) -> Blocks:
    codes = _fields(blocks[:, :128], 4, 64) | _fields(blocks[:, 128:192], 2, 32) << np.uint8(4)
    scales = blocks[:, 192:208].view(np.int8).astype(np.float32)
    return codes.astype(np.int8) - np.int8(32), _half(blocks, 208) * scales, None


def _iq4_nl(blocks: Octets) -> Blocks:
    return _IQ4[_fields(blocks[:, 2:], 4, 16)], _half(blocks, 0), None


def _iq4_xs(blocks: Octets) -> Blocks:
    low = np.stack([blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4], axis=-1).reshape(len(blocks), 8)
    high = np.stack([blocks[:, 2:4] >> shift & 3 for shift in (0, 2, 4, 6)], axis=-1).reshape(len(blocks), 8)
    scales = (low | high << np.uint8(4)).astype(np.int8) - np.int8(32)
    return _IQ4[_fields(blocks[:, 8:], 4, 16)], _half(blocks, 0) * scales.astype(np.float32), None


READERS: dict[str, tuple[int, Callable[[Octets], Blocks]]] = {
    "Q4_0": (18, _q4_0),
    "Q4_1": (20, _q4_1),
    "Q5_0": (22, _q5_0),
    "Q5_1": (24, _q5_1),
    "Q8_0": (34, _q8_0),
    "Q2_K": (84, _q2_k),
    "Q3_K": (110, _q3_k),
    "Q4_K": (144, _q4_k),
    "Q5_K": (176, _q5_k),
    "Q6_K": (210, _q6_k),
    "IQ4_NL": (18, _iq4_nl),
    "IQ4_XS": (136, _iq4_xs),
}
"""By type: bytes of a block, and what reads blocks."""
