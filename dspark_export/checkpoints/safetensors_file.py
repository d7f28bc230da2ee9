"""Reads and checks the header of a safetensors file without touching its payload.

Format: 8 bytes little-endian header length, a JSON object ``name -> {dtype, shape, data_offsets}``, then the payload.
The rules are those of the safetensors library (offsets contiguous from 0 to the end of the file), plus two it leaves
out: no duplicate names, no empty tensors. We have our own reader so that a message can name the tensor and the file.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dspark_runtime.errors import InvalidWeights

MAX_HEADER_BYTES = 100_000_000
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
_BITS = {
    **{"BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64},
    **{"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "C64": 64},
    **{
        "F8_E4M3": 8,
        "F8_E5M2": 8,
        "F8_E8M0": 8,
        "F8_E4M3FNUZ": 8,
        "F8_E5M2FNUZ": 8,
        "F4": 4,
        "F6_E2M3": 6,
        "F6_E3M2": 6,
    },
}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file; ``start`` and ``end`` are byte offsets into the payload."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(path: Path) -> dict[str, StoredTensor]:
    """All tensors of ``path`` by name; InvalidWeights for anything a reader could stumble over."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise InvalidWeights(f"{path} is cut short: its header should have {length} bytes; download it again")
        if length > MAX_HEADER_BYTES:
            raise InvalidWeights(f"{path} has a header of {length} bytes, more than the {MAX_HEADER_BYTES} allowed")
        text = file.read(length)
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except _Duplicate as cause:
        raise InvalidWeights(f"{path} has {cause} twice in its header; get the checkpoint again") from cause
    except (ValueError, RecursionError) as cause:
        raise InvalidWeights(f"{path} has no valid safetensors header ({cause}); get the checkpoint again") from cause
    if not isinstance(header, dict):
        raise InvalidWeights(f"{path} has a header that is not a JSON object; is it a safetensors file?")
    header.pop("__metadata__", None)
    tensors = {name: _stored(path, name, entry) for name, entry in header.items()}
    _check_layout(path, tensors, size - 8 - length)
    return tensors


class _Duplicate(ValueError):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise _Duplicate(repr(key))
        result[key] = value
    return result


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _stored(path: Path, name: str, entry: Any) -> StoredTensor:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise InvalidWeights(f"{path}: the header entry of {name!r} needs exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype not in _BITS:
        raise InvalidWeights(f"{path}: {name!r} has the unknown dtype {dtype!r}; known are {', '.join(sorted(_BITS))}")
    if not isinstance(shape, list) or not all(_integer(dim) for dim in shape):
        raise InvalidWeights(f"{path}: {name!r} has the impossible shape {shape!r}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_integer(offset) for offset in offsets):
        raise InvalidWeights(f"{path}: {name!r} has impossible data_offsets {offsets!r}")
    start, end = offsets
    if 0 in shape:
        raise InvalidWeights(f"{path}: {name!r} is empty (shape {shape}); a weight has at least one element")
    bits = math.prod(shape) * _BITS[dtype]
    if (end - start) * 8 != bits:
        raise InvalidWeights(f"{path}: {name!r} is {dtype} {shape}, {bits // 8} bytes, but holds {end - start}")
    return StoredTensor(dtype, tuple(shape), start, end)


def _check_layout(path: Path, tensors: dict[str, StoredTensor], payload: int) -> None:
    position, before = 0, "the header"
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if tensor.start < position:
            raise InvalidWeights(f"{path}: {name!r} overlaps {before}; get the checkpoint again")
        if tensor.start > position:
            raise InvalidWeights(f"{path}: {tensor.start - position} unused bytes between {before} and {name!r}")
        position, before = tensor.end, repr(name)
    if payload < position:
        raise InvalidWeights(
            f"{path} is cut short: {position} bytes of weights expected, {payload} there; download it again"
        )
    if payload > position:
        raise InvalidWeights(f"{path} has {payload - position} bytes after its last tensor; get the checkpoint again")
