"""Builds that are killed, interrupted, run out of space or collide: no half-written bundle, no leftover files."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dspark_runtime.bundle.files import BundleFiles
from dspark_runtime.errors import BundleNotWritten, ModelNotFound
from tests.build.fault_driver import STAGES
from tests.checkpoints.checkpoint_samples import write_checkpoint

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def workplace() -> Iterator[Path]:
    """A folder that another user may enter, with a checkpoint in it."""
    folder = Path(tempfile.mkdtemp(prefix="dspark-faults-"))
    folder.chmod(0o755)
    model = write_checkpoint(folder / "model")
    model.chmod(0o755)
    for path in model.iterdir():
        path.chmod(0o644)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def outcomes(workplace: Path) -> dict[str, dict[str, Any]]:
    (workplace / "out").mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "tests.build.fault_driver", str(workplace / "model"), str(workplace / "out")],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # a process that forks must have no threads
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {line["fault"]: line for line in lines}


@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_build_leaves_no_bundle(outcomes: dict[str, dict[str, Any]], stage: str) -> None:
    outcome = outcomes[f"kill-{stage}"]
    assert outcome["code"] == -signal.SIGKILL
    assert not outcome["complete"] and "bundle" not in outcome["left"]


@pytest.mark.parametrize("stage", STAGES)
def test_the_next_build_cleans_up(outcomes: dict[str, dict[str, Any]], stage: str) -> None:
    """Even one that fails itself, here because its model does not exist."""
    assert outcomes[f"kill-{stage}"]["left"], "a killed build cannot clean up"
    assert outcomes[f"rerun-{stage}"] | {"fault": ""} == {
        "fault": "",
        "code": ModelNotFound.exit_code,
        "left": [],
        "complete": False,
    }


@pytest.mark.parametrize("stage", STAGES)
def test_an_interrupted_build_leaves_nothing(outcomes: dict[str, dict[str, Any]], stage: str) -> None:
    outcome = outcomes[f"interrupt-{stage}"]
    assert (outcome["code"], outcome["left"]) == (130, [])


@pytest.mark.parametrize(
    "fault", ["small-files", "full-disk-save", "full-disk-tokenizer", "full-disk-commit", "read-only"]
)
def test_a_failed_write_leaves_nothing(outcomes: dict[str, dict[str, Any]], fault: str) -> None:
    outcome = outcomes[fault]
    assert (outcome["code"], outcome["left"]) == (BundleNotWritten.exit_code, [])


def test_a_build_after_all_that_succeeds(outcomes: dict[str, dict[str, Any]], workplace: Path) -> None:
    assert outcomes["undisturbed"]["code"] == 0
    folder = workplace / "out" / "kill-save"
    assert [path.name for path in folder.iterdir()] == ["bundle"]
    assert BundleFiles.open(folder / "bundle").manifest.source.id == "model"


def wait_for_stage(running: subprocess.Popen[str], stage: str) -> None:
    """Read progress until ``stage`` begins."""
    assert running.stderr is not None
    for line in running.stderr:
        if line.startswith("{") and json.loads(line)["stage"] == stage:
            return
    raise AssertionError(f"the build ended before {stage}")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_to_the_command_line(workplace: Path, tmp_path: Path, number: int, code: int) -> None:
    """In the middle of tracing, where most of the time goes."""
    out = tmp_path / "bundle"
    command = [
        sys.executable,
        "-m",
        "dspark_export.cli.main",
        "build",
        str(workplace / "model"),
        "--phrases",
        "0",
        "--out",
        str(out),
    ]
    with subprocess.Popen([*command, "--progress", "json"], cwd=ROOT, stderr=subprocess.PIPE, text=True) as running:
        wait_for_stage(running, "trace")
        time.sleep(1.0)
        running.send_signal(number)
        running.communicate(timeout=60)
    assert running.returncode == code
    assert list(tmp_path.iterdir()) == []


def test_two_builds_into_one_folder(workplace: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dspark_export.cli.main", "build", str(workplace / "model"), "--phrases", "0"]
    command += ["--out", str(tmp_path / "bundle"), "--self-draft", "none", "--progress", "json"]
    first = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    wait_for_stage(first, "check")
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert second.returncode == 7 and "another build" in second.stderr
    first.communicate(timeout=120)
    assert first.returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    third = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert third.returncode == 7 and "--overwrite" in third.stderr
