"""doctor: what it finds here, and what it says where something is missing."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata
from typing import Any

import pytest

from dspark_export.cli import doctor
from tests.cli.conftest import Invoke

BLOCKED = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocked())
sys.argv = ["dspark-export", "doctor", "--json"]
from dspark_export.cli.main import app
app()
"""


def _backends(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {finding["name"]: finding for finding in found["backends"]}


def test_json(invoke: Invoke) -> None:
    result = invoke("doctor", "--json")
    assert result.exit_code == 0 and result.stderr == ""
    found = json.loads(result.stdout)
    assert found["healthy"] is True
    assert set(found["machine"]) == {"python", "platform", "cpu", "cores", "instructions"}
    backends = _backends(found)
    assert backends["ONNX Runtime, CPU"]["works"]
    assert set(backends) >= {
        "ONNX Runtime, CUDA",
        "NVIDIA driver",
        "TensorRT",
        "TensorRT-RTX",
        "cuda-core",
        "Polygraphy",
    }
    assert all(finding["remedy"] for finding in found["backends"] + found["packages"] if not finding["works"])
    names = {finding["name"] for finding in found["packages"]}
    assert names >= {"numpy", "onnxruntime", "torch", "transformers", "tokenizers"}


def test_for_people(invoke: Invoke) -> None:
    result = invoke("doctor")
    assert result.exit_code == 0 and result.stderr == ""
    for text in ("python", "instructions", "ONNX Runtime, CPU", "torch"):
        assert text in result.stdout


@pytest.mark.parametrize(("names", "code"), [(("torch", "transformers"), 0), (("onnxruntime",), 8)])
def test_where_packages_are_missing(names: tuple[str, ...], code: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED.format(names=names)], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert json.loads(done.stdout)["healthy"] is (code == 0)


def test_an_old_version_is_named_with_the_command(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    real = metadata.version

    def version(name: str) -> str:
        return "0.0.1" if name == "numpy" else real(name)

    monkeypatch.setattr(doctor.metadata, "version", version)
    found = json.loads(invoke("doctor", "--json").stdout)
    numpy = next(finding for finding in found["packages"] if finding["name"] == "numpy")
    assert not numpy["works"]
    assert "0.0.1, but wanted >=" in numpy["detail"]
    assert numpy["remedy"].startswith('pip install "numpy>=')


def test_a_backend_that_runs_wrongly_is_no_backend(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_run_scatter", lambda provider: False)
    result = invoke("doctor", "--json")
    assert result.exit_code == 8
    found = _backends(json.loads(result.stdout))["ONNX Runtime, CPU"]
    assert "wrongly" in found["detail"] and found["remedy"].startswith("pip install")


def test_a_broken_installation_is_a_finding(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(provider: str) -> bool:
        raise OSError("libstdc++ is too old")

    monkeypatch.setattr(doctor, "_run_scatter", broken)
    result = invoke("doctor")
    assert result.exit_code == 8
    assert "libstdc++ is too old" in " ".join(result.stdout.split())
