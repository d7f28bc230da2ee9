"""Builds the project's two distributions, for tests of what is in them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RUNTIME = ROOT / "runtime"


def build(folder: Path, out: Path, *kinds: str, **environment: str) -> str:
    """Build the distribution whose pyproject.toml is in ``folder``: wheel and sdist, or those of ``kinds``.

    Returns what the build said. The runtime's kernels are compiled without optimization, which is quicker.
    """
    if folder == RUNTIME:
        return _build_runtime(out, kinds or ("wheel", "sdist"), environment)
    pytest.importorskip("hatchling", reason="needs hatchling (extra `dev`), which builds the packages")
    targets = [argument for kind in kinds for argument in ("-t", kind)]
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(out), *targets]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _build_runtime(out: Path, kinds: Sequence[str], environment: Mapping[str, str]) -> str:
    pytest.importorskip("scikit_build_core", reason="needs scikit-build-core (extra `dev`), which builds the runtime")
    if shutil.which("cmake") is None:
        pytest.skip("needs cmake")
    calls = "; ".join(f"backend.build_{kind}({str(out)!r})" for kind in kinds)
    done = subprocess.run(
        [sys.executable, "-c", f"from scikit_build_core import build as backend; {calls}"],
        cwd=RUNTIME,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"SKBUILD_CMAKE_BUILD_TYPE": "Debug"} | environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def built_wheel(folder: Path, out: Path, **environment: str) -> Path:
    """The wheel alone, put into ``out``."""
    build(folder, out, "wheel", **environment)
    (wheel,) = out.glob("*.whl")
    return wheel


def pep517_wheels(folder: Path, out: Path) -> list[Path]:
    """The wheels in ``out`` after one was made there as pip makes it, by the backend that pyproject.toml names."""
    code = "import sys; sys.path.insert(0, 'scripts'); import packaging_backend as b; b.build_wheel(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(out)], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return list(out.glob("*.whl"))
