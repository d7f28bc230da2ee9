"""Builds the project's two distributions, for tests of what is in them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def build(folder: Path, out: Path, *arguments: str) -> None:
    """Build the distribution whose pyproject.toml is in ``folder``: wheel and sdist, or what ``arguments`` say."""
    pytest.importorskip("hatchling", reason="needs hatchling (extra `dev`), which builds the packages")
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(out), *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def built_wheel(folder: Path, out: Path) -> Path:
    """The wheel alone, put into ``out``."""
    build(folder, out, "-t", "wheel")
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
