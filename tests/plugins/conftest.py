"""The host build, compiled once per session."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.plugins.host_library import HostLibrary

ROOT = Path(__file__).resolve().parents[2]
PLUGINS = ROOT / "plugins"
FLAGS = [
    "-std=c++17",
    "-ffp-contract=off",
    "-Wall",
    "-Wextra",
    "-Werror",
    f"-I{PLUGINS / 'include'}",
]


def compile_host(output: Path, *options: str, sources: tuple[str, ...] = ("host/library.cpp",)) -> Path:
    """Build ``output`` with g++; the test is skipped where there is none."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++ to build the host library; none is on the path")
    command = [compiler, *FLAGS, *options, *(str(PLUGINS / source) for source in sources), "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return output


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> HostLibrary:
    if given := os.environ.get("DSPARK_HOST_LIBRARY"):
        return HostLibrary(Path(given))  # built otherwise, see test_sanitizers
    return HostLibrary(compile_host(tmp_path_factory.mktemp("host") / "libdspark_host.so", "-O2", "-shared", "-fPIC"))
