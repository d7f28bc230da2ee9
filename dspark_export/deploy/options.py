"""What a deployment serves, and how."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from dspark_runtime.bundle.files import TOKENIZER_DIR, BundleFiles
from dspark_runtime.errors import UsageError
from dspark_serve.triton.settings import Settings

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class DeployOptions:
    """``settings``: of the service. ``copy``: put the bundle into the deployment, instead of naming where it is.

    Raises:
        UsageError: a name that is not a file name, a value out of range, or a backend the bundle has no engines for.
        BundleError: no bundle, or a damaged or incompatible one.
    """

    bundle: Path
    name: str
    settings: Settings
    copy: bool = True
    has_tokenizer: bool = field(init=False)

    def __post_init__(self) -> None:
        manifest = BundleFiles.open(self.bundle).manifest
        object.__setattr__(self, "has_tokenizer", f"{TOKENIZER_DIR}/tokenizer.json" in manifest.files)
        backend = self.settings.backend
        if backend.startswith("tensorrt") and not any(engine.flavour == backend for engine in manifest.engines):
            raise UsageError(
                f"{self.bundle} has no engines for {backend}; `dspark-export compile --backend {backend}` adds them"
            )
        if not _NAME.fullmatch(self.name):
            raise UsageError(f"--name {self.name!r}: give letters, digits, '.', '_' and '-', at most 100")
        self.settings.service_options()  # checks


def name_of(bundle: Path) -> str:
    """A name for the model of the bundle in this folder."""
    stem = bundle.resolve().name.removesuffix(".dspark")
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-._") or "model"
