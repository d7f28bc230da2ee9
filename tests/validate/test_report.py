"""The command line, the report in the bundle, floors, and what plain Polygraphy users get."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dspark_export.build.options import BuildOptions
from dspark_export.build.pipeline import build
from dspark_export.cli.main import app
from dspark_export.validate.run import missing_weights
from dspark_runtime.bundle.files import BundleFiles
from dspark_runtime.bundle.manifest import Source
from tests import tiny_models
from tests.validate.conftest import Healthy


def invoke(*arguments: object) -> Any:
    result = CliRunner().invoke(app, ["validate", *(str(a) for a in arguments), "--threads", "1"])
    assert "Traceback" not in result.output and result.exit_code != 70, result.output
    return result


@pytest.fixture(scope="module")
def stored(healthy: Healthy, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A bundle validated without its model, and what the command printed."""
    bundle = tmp_path_factory.mktemp("stored") / "bundle"
    shutil.copytree(healthy.bundle, bundle)
    return bundle, invoke(bundle, "--json")


def test_the_bundle_keeps_report_and_verdict(stored: tuple[Path, Any]) -> None:
    bundle, result = stored
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    files = BundleFiles.open(bundle)  # every digest is right
    verdict = files.manifest.validation
    assert verdict["passed"] is True and verdict["failed"] == [] and report["passed"] is True
    assert set(verdict["acceptance"]) == {"ngram", "store", "self-draft", "dspark"}  # type: ignore[arg-type]
    assert json.loads(files.path(str(verdict["json"])).read_text("utf-8")) == report
    skipped = {c["id"] for c in report["checks"] if c["status"] == "skipped"}
    assert skipped == {"numerics.pytorch", "numerics.dspark"}
    assert not list(bundle.parent.glob(".*"))  # no lock, nothing half-written


def test_noise_is_measured_as_the_build_measured_it(stored: tuple[Path, Any]) -> None:
    """On another text, or in other passes, the largest difference would be another one."""
    recorded = BundleFiles.open(stored[0]).manifest.precision.row_noise
    found = next(c for c in json.loads(stored[1].stdout)["checks"] if c["id"] == "losslessness.noise")["data"]
    assert recorded is not None and recorded.max_abs_logit_diff > 0
    assert found["single_row"] == recorded.max_abs_logit_diff
    assert found["other_rows"] == recorded.without_single_rows


def test_the_page_needs_nothing_else(stored: tuple[Path, Any]) -> None:
    files = BundleFiles.open(stored[0])
    page = files.path(str(files.manifest.validation["html"])).read_text("utf-8")
    assert page.count("<svg") >= 4 and 'name="viewport"' in page and "@media print" in page
    assert not re.findall(r'(?:src|href)="(?!#|[^"]*-)', page) and "<script" not in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_a_second_validation_replaces_the_first(stored: tuple[Path, Any]) -> None:
    bundle, _ = stored
    before = set((bundle / "validation").iterdir())
    assert invoke(bundle).exit_code == 0
    after = set((bundle / "validation").iterdir())
    assert len(after) == 2 and not before & after
    BundleFiles.open(bundle)


def test_a_drop_of_acceptance_fails_and_does_not_lower_the_floor(stored: tuple[Path, Any], tmp_path: Path) -> None:
    bundle, _ = stored
    floors = tmp_path / "floors.json"
    floors.write_text(json.dumps({"acceptance": {"ngram": 9.0}}), "utf-8")
    dropped = invoke(bundle, "--floors", floors, "--out", tmp_path / "report")
    assert dropped.exit_code == 10 and "plumbing.acceptance.ngram" in dropped.output
    told = json.loads((tmp_path / "report" / "report.json").read_text("utf-8"))
    assert [c["id"] for c in told["checks"] if c["status"] == "failed"] == ["plumbing.acceptance.ngram"]
    assert BundleFiles.open(bundle).manifest.validation["passed"] is True  # --out leaves the bundle alone
    assert "FAILED" in dropped.output and (tmp_path / "report" / "report.html").is_file()


def test_a_rebuild_keeps_the_floors(tmp_path: Path) -> None:
    tiny_models.save_checkpoint("llama", tmp_path / "model")
    options = BuildOptions(
        model=str(tmp_path / "model"), out=tmp_path / "b", self_draft="none", threads=1, overwrite=True
    )
    build(options)
    assert invoke(tmp_path / "b").exit_code == 0
    floors = BundleFiles.open(tmp_path / "b").manifest.validation["acceptance"]
    build(options)
    again = BundleFiles.open(tmp_path / "b").manifest.validation
    assert again == {"level": "quick", "acceptance": floors} and floors


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--against", "tensorrt-rtx"], 2, "no such engines"),
        (["--against", "torch"], 2, "--model"),
        (["--against", "llama.cpp"], 2, "GGUF"),
        (["--draft", "DRAFT"], 2, "--model"),
        (["--model", "nowhere/"], 3, "no file or folder"),
        (["--floors", "nowhere.json"], 2, "not a report"),
        (["--prompts", "nowhere.txt"], 2, "no such file"),
    ],
)
def test_wrong_options(healthy: Healthy, tmp_path: Path, arguments: list[str], code: int, words: str) -> None:
    given = [str(healthy.draft) if a == "DRAFT" else a for a in arguments]
    result = invoke(healthy.bundle, *given, "--out", tmp_path / "out")
    assert result.exit_code == code, result.output
    assert words in result.output
    assert not (tmp_path / "out" / "report.json").exists()


def test_another_checkpoint_is_refused(healthy: Healthy, tmp_path: Path) -> None:
    tiny_models.save_checkpoint("llama", tmp_path / "other")
    result = invoke(healthy.bundle, "--model", tmp_path / "other", "--out", tmp_path / "out")
    assert result.exit_code == 2 and "is not the checkpoint" in result.output


ONE, TWO = "1" * 64, "2" * 64


def test_a_checkpoint_may_have_been_renamed() -> None:
    def of(files: dict[str, str]) -> Source:
        return Source(kind="gguf", id="model", revision=None, files=files)

    built_from = of({"a.gguf": ONE, "b.safetensors": TWO, "config.json": "3" * 64})
    assert missing_weights(built_from, of({"x.gguf": ONE, "y.safetensors": TWO})) == []
    assert missing_weights(built_from, of({"a.gguf": ONE, "b.safetensors": "4" * 64})) == ["b.safetensors"]


def test_the_script_for_polygraphy_runs(healthy: Healthy, tmp_path: Path) -> None:
    result = invoke(healthy.bundle, "--polygraphy-script", tmp_path / "script")
    assert result.exit_code == 0, result.output
    script = tmp_path / "script" / "compare.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    other = healthy.bundle / "onnx" / "self_draft.onnx"
    wrong = subprocess.run([sys.executable, script, other], capture_output=True, text=True, check=False, timeout=300)
    assert wrong.returncode != 0
