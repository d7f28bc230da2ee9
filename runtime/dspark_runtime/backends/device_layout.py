"""How a pass lies in page-locked memory: its inputs one after another, its taps in the engine's own type."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from dspark_runtime.backends.cuda import Bytes
from dspark_runtime.backends.device_cache import ELEMENT_BYTES
from dspark_runtime.backends.device_shapes import PassShape
from dspark_runtime.bundle.contract import ATTENTION_MASK, INPUT_IDS, LOGIT_ROWS, POSITION_IDS, WRITE_INDICES

INPUTS = (INPUT_IDS, POSITION_IDS, WRITE_INDICES, LOGIT_ROWS, ATTENTION_MASK)
ALIGNMENT = 256


def layout(batch: int, tokens: int, rows: int, kv_len: int) -> tuple[dict[str, tuple[int, tuple[int, ...]]], int]:
    """Offset and dims of every input in its staging memory, and the bytes of all."""

    def sizes() -> Iterator[tuple[str, tuple[int, ...], int]]:
        yield INPUT_IDS, (batch, tokens), 8
        yield POSITION_IDS, (batch, tokens), 8
        yield WRITE_INDICES, (batch,), 8
        yield LOGIT_ROWS, (batch, rows), 8
        yield ATTENTION_MASK, (batch, 1, tokens, kv_len), 1

    places, end = {}, 0
    for name, dims, width in sizes():
        places[name] = end, dims
        end += -(-int(np.prod(dims)) * width // ALIGNMENT) * ALIGNMENT
    return places, end


def widened(raw: Bytes, dtype: str, shape: PassShape, wanted: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Rows [batch, tokens, width] of ``dtype`` at the start of ``raw`` as float32, without padding rows."""
    batch, tokens, width = wanted
    size = ELEMENT_BYTES[dtype] * shape.batch * shape.tokens * width
    numbers = raw[:size].view(np.float32) if dtype == "float32" else to_float32(raw[:size].view(np.uint16), dtype)
    return numbers.reshape(shape.batch, shape.tokens, width)[:batch, :tokens]


def to_float32(stored: npt.NDArray[np.uint16], dtype: str) -> npt.NDArray[np.float32]:
    """Numbers of ``dtype`` float16 or bfloat16, given as their bits."""
    if dtype == "float16":
        return stored.view(np.float16).astype(np.float32)
    return (stored.astype(np.uint32) << 16).view(np.float32)
