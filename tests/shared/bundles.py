"""Bundles that are built once for everything they follow from; tiny ones by the command line, as a user would."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dspark_export.build.measure import measured_device
from tests import tiny_models
from tests.shared.digests import TOOLS, closure
from tests.shared.folders import ROOT, shared_folder


def build_digest(code: Iterable[Path], data: Iterable[Path], settings: object) -> str:
    """Of a build: ``code`` and what it imports of this repository, ``data``, tools, and the machine it measures."""
    digest = hashlib.sha256(repr(settings).encode())
    for path in (*sorted(closure(code)), *sorted(data)):
        digest.update(f"{path.name} ".encode() + hashlib.sha256(path.read_bytes()).digest())
    for name in (*TOOLS, "numpy", "onnxruntime", "tokenizers"):
        digest.update(f"{name} {version(name)} ".encode())
    digest.update(f"{sys.version} {measured_device()} {os.environ.get('DSPARK_CPU_LIBRARY')}".encode())
    return digest.hexdigest()


def built_llama(folder: Path, self_draft: str = "layers=0,2", **changes: Any) -> Path:
    """A llama with random weights, float32; ``changes`` are of its config. The bundle is ``folder / "bundle"``.

    It is a copy: tests may write into it.
    """
    code = (ROOT / "dspark_export" / "cli" / "build.py", ROOT / "tests" / "tiny_models.py")
    content = build_digest(code, [Path(__file__)], (self_draft, sorted(changes.items())))
    made = shared_folder("bundles", content, lambda empty: _build_llama(empty, self_draft, changes))
    shutil.copytree(made, folder, dirs_exist_ok=True)
    return folder / "bundle"


def _build_llama(folder: Path, self_draft: str, changes: dict[str, Any]) -> None:
    from typer.testing import CliRunner

    from dspark_export.cli.main import app

    tiny_models.save_checkpoint("llama", folder / "model", **changes)
    arguments = [
        "build",
        str(folder / "model"),
        "--out",
        str(folder / "bundle"),
        "--self-draft",
        self_draft,
        "--phrases",
        "0",
    ]
    result = CliRunner().invoke(app, [*arguments, "--precision", "fp32", "--threads", "1"])
    assert result.exit_code == 0, result.output
