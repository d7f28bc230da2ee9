"""What a validation compares with, and how much of it each level covers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Against = Literal["torch", "onnxruntime", "tensorrt", "tensorrt-rtx", "llama.cpp"]
Level = Literal["quick", "full"]


@dataclass(frozen=True)
class Extent:
    """How much a level does. ``tokens``: of a teacher-forced text; ``new``: generated per prompt."""

    prompts: int
    texts: int
    tokens: int
    new: int
    batch: int


EXTENTS: dict[Level, Extent] = {
    "quick": Extent(prompts=1, texts=2, tokens=64, new=32, batch=0),
    "full": Extent(prompts=4, texts=3, tokens=160, new=96, batch=4),
}
