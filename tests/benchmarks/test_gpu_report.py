"""The GPU report, run on the CPU backend: every figure is there, the page and the picture are written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dspark_export.build.options import BuildOptions
from dspark_export.build.pipeline import build
from dspark_runtime.backends.tensorrt_device import this_device
from tests import tiny_models

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu_report.py"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    model = tiny_models.save_checkpoint("llama", folder / "model", head_dim=16, num_hidden_layers=1)
    build(BuildOptions(str(model), folder / "bundle", self_draft="none"))
    return folder / "bundle"


def report(bundle: Path, out: Path, backends: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), str(bundle), "--out", str(out), "--backends", backends]
    return subprocess.run(
        [*command, "--limit", "1", "--tokens", "24"], capture_output=True, text=True, check=False, cwd=SCRIPT.parents[1]
    )


@pytest.mark.skipif(this_device() is not None, reason="this machine has a GPU, whose tests it would run")
def test_every_figure_is_there(bundle: Path, tmp_path: Path) -> None:
    done = report(bundle, tmp_path / "out", "onnxruntime,tensorrt")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    figures = found["backends"]["onnxruntime"]
    assert figures["logits"]["largest_difference"] == 0 and figures["logits"]["rows"] > 0
    assert figures["exact"] and figures["differing_texts"] == 0
    assert [mode["mode"] for mode in figures["modes"]] == ["off", "ngram", "auto"]
    assert all(ms > 0 for ms in figures["pass_ms"].values()) and figures["host_us_per_round"] > 0
    assert "no tensorrt engine of target" in found["refused"]["tensorrt"]
    page = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "| off |" in page and "![rounds](timeline-onnxruntime.png)" in page
    assert (tmp_path / "out" / "timeline-onnxruntime.png").stat().st_size > 1000


@pytest.mark.skipif(this_device() is not None, reason="this machine has a GPU")
def test_without_a_backend_it_says_why(bundle: Path, tmp_path: Path) -> None:
    done = report(bundle, tmp_path / "out", "onnxruntime-cuda")
    assert done.returncode == 8 and "needs an NVIDIA GPU" in done.stderr
