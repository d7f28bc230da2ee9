"""Pass times of several bundles, measured alternately."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import pass_costs
from dspark_export.build.options import BuildOptions
from dspark_export.build.pipeline import build
from tests import tiny_models


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_models.save_checkpoint("llama", tmp_path / "model")
    bundle = str(tmp_path / "bundle")
    build(BuildOptions(str(model), Path(bundle), self_draft="none", threads=1))
    command = ["pass_costs.py", bundle, "--threads", "1", "--repeats", "2", "--context", "16"]
    monkeypatch.setattr(sys, "argv", [*command, "--rows", "1,3", "--json"])
    assert pass_costs.main() == 0
    (times,) = json.loads(capsys.readouterr().out).values()
    assert set(times) == {"1", "3"} and all(ms > 0 for ms in times.values())

    monkeypatch.setattr(sys, "argv", [*command, "--rows", "2"])
    assert pass_costs.main() == 0
    heading, row = capsys.readouterr().out.splitlines()
    assert heading.split() == ["rows", "2"] and row.split()[0] == bundle

    for wrong in ([bundle, "--rows", "two"], [bundle, "--rows", "0,1"], [str(tmp_path / "nothing")]):
        monkeypatch.setattr(sys, "argv", ["pass_costs.py", *wrong])
        assert pass_costs.main() == 2 and "error: " in capsys.readouterr().err
