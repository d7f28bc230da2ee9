"""``doctor BUNDLE``: why an engine cannot run here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dspark_export.cli.main import app
from dspark_runtime.backends import tensorrt_device
from dspark_runtime.backends.tensorrt_check import DeviceFacts
from tests.engines.test_plan_checks import change, flip


def findings(bundle: Path) -> list[dict[str, object]]:
    result = CliRunner().invoke(app, ["doctor", str(bundle), "--json"])
    assert result.exit_code == 0, result.output
    found: list[dict[str, object]] = json.loads(result.stdout)["engines"]
    return found


def test_without_a_gpu(compiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_device, "this_device", lambda: None)
    target, draft = findings(compiled)
    assert (target["graph"], draft["graph"]) == ("target", "self_draft") and not target["works"]
    assert [str(reason) for reason in target["reasons"]] == [  # type: ignore[attr-defined]
        "the engine of target needs an NVIDIA GPU of compute capability 8.0, 8.6, 8.9, 12.0, 12.1 and its driver, this "
        "machine has none; run the bundle's graphs with ONNX Runtime, or move to such a machine"
    ]


def test_with_another_gpu_and_version(compiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Path(shutil.copytree(compiled, tmp_path / "bundle"))
    change(bundle, lambda raw: raw["engines"][0].update(version="1.6.0.10"))
    monkeypatch.setattr(tensorrt_device, "this_device", lambda: DeviceFacts("7.5", "NVIDIA T4", 12040))
    result = CliRunner().invoke(app, ["doctor", str(bundle)])
    assert result.exit_code == 0
    assert "-- engine target (tensorrt-rtx 1.6.0.10)" in result.stdout
    assert "needs tensorrt-rtx 1.6.0.10, installed is 1." in result.stdout
    assert "that of NVIDIA T4 offers 12.4; update the NVIDIA driver" in result.stdout


def test_with_a_gpu_it_is_for(compiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_device, "this_device", lambda: DeviceFacts("8.9", "NVIDIA L4", 13000))
    assert [(finding["works"], finding["reasons"]) for finding in findings(compiled)] == [(True, []), (True, [])]


def test_a_damaged_plan_is_an_error(compiled: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(compiled, tmp_path / "bundle"))
    flip(bundle)
    result = CliRunner().invoke(app, ["doctor", str(bundle)])
    assert result.exit_code == 7 and "was altered" in result.stderr


def test_the_machine_is_asked_without_any_package() -> None:
    device = tensorrt_device.this_device()
    assert device is None or device.capability.count(".") == 1
    assert tensorrt_device.this_device(10_000) is None
