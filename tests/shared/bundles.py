"""Tiny bundles, built by the command line as a user would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests import tiny_models


def built_llama(folder: Path, self_draft: str = "layers=0,2", **changes: Any) -> Path:
    """A llama with random weights, float32; ``changes`` are of its config. The bundle is ``folder / "bundle"``."""
    from typer.testing import CliRunner

    from dspark_export.cli.main import app

    tiny_models.save_checkpoint("llama", folder / "model", **changes)
    arguments = ["build", str(folder / "model"), "--out", str(folder / "bundle"), "--self-draft", self_draft]
    result = CliRunner().invoke(app, [*arguments, "--precision", "fp32", "--threads", "1"])
    assert result.exit_code == 0, result.output
    return folder / "bundle"
