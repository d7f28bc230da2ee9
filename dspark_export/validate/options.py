"""What a validation is asked to do, and how much of it a level is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from dspark_export.checkpoints.trust import Trust

Against = Literal["torch", "onnxruntime", "tensorrt", "tensorrt-rtx"]
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


@dataclass(frozen=True)
class ValidateOptions:
    """What to validate.

    ``against``: None for PyTorch if the model can be found, else ONNX Runtime. ``prompts``: sets or files, none for the
    shipped ones. ``model``: the checkpoint, None for the hub model of the manifest. ``drafts``: checkpoints of trained
    drafters. ``floors``: accepted lengths by mode that must be reached, besides those of the bundle. ``keep``: folder
    for inputs of failing passes, None for one beside the bundle.
    """

    bundle: Path
    against: Against | None = None
    level: Level = "quick"
    prompts: Sequence[str] = ()
    model: str | None = None
    revision: str | None = None
    drafts: Sequence[str] = ()
    threads: int | None = None
    exact: bool | None = None
    floors: Mapping[str, float] = field(default_factory=dict)
    keep: Path | None = None
    trust: Trust = field(default_factory=Trust.closed)
