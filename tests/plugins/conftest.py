"""The host build, compiled once for equal sources."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.plugins.host_library import HostLibrary
from tests.shared.folders import shared_folder

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
    """Build ``output`` with g++, once for equal sources; the test is skipped where there is none.

    Each caller has a copy: the state inside a loaded library is shared by all that load the same file.
    """
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++ to build the host library; none is on the path")
    command = [compiler, *FLAGS, *options, *(str(PLUGINS / source) for source in sources)]
    read = _run(*command, "-MM").replace("\\\n", " ").split()
    digest = hashlib.sha256(repr((FLAGS[:-1], options, sources, _run(compiler, "--version"))).encode())
    for file in sorted({Path(word).resolve() for word in read if not word.endswith(":")}):
        digest.update(f"{file.relative_to(ROOT)} ".encode() + hashlib.sha256(file.read_bytes()).digest())

    def make(folder: Path) -> None:
        _run(*command, "-o", str(folder / "library.so"))

    shutil.copy(shared_folder("host", digest.hexdigest(), make) / "library.so", output)
    return output


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> HostLibrary:
    if given := os.environ.get("DSPARK_HOST_LIBRARY"):
        return HostLibrary(Path(given))  # built otherwise, see test_sanitizers
    return HostLibrary(compile_host(tmp_path_factory.mktemp("host") / "libdspark_host.so", "-O2", "-shared", "-fPIC"))
