"""Options of a validation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dspark_export.checkpoints.trust import Trust
from dspark_export.validate.extent import Against, Level


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
