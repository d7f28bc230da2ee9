"""The kernels under sanitizers and under emulation of another processor. Slow: they compile the library again."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.plugins.cpu.library import SOURCES, compile_library

HERE = Path(__file__).resolve().parent
COMPARE = (HERE / "compare_sets.cpp",)

pytestmark = pytest.mark.slow


def run(command: list[str | Path], **environment: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


def test_threads_do_not_race(tmp_path: Path) -> None:
    program = compile_library(tmp_path / "compare", "-fsanitize=thread", "-g", "-pthread", extra=COMPARE)
    assert "0 differences" in run([program])


def test_addresses_and_undefined_behaviour(tmp_path: Path) -> None:
    """The other tests of this folder again, with a library that watches every access."""
    flags = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g")
    library = compile_library(tmp_path / "libdspark_cpu.so", *flags)
    # libstdc++ as well: its throw must be known before the library throws its first refusal.
    runtimes = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so.6")
    ]
    run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not slow", HERE],
        DSPARK_CPU_LIBRARY=str(library),
        LD_PRELOAD=" ".join(runtimes),
        ASAN_OPTIONS="detect_leaks=0",
    )


def test_neon_under_emulation(tmp_path: Path) -> None:
    emulator = shutil.which("qemu-aarch64-static")
    if emulator is None:
        pytest.skip(
            "needs qemu-aarch64-static and aarch64-linux-gnu-g++ (Debian: qemu-user-static, g++-aarch64-linux-gnu)"
        )
    program = compile_library(
        tmp_path / "compare",
        *("-static", "-pthread"),
        compiler="aarch64-linux-gnu-g++",
        machine="aarch64",
        extra=COMPARE,
    )
    assert "against portable: neon\n0 differences" in run([emulator, program])


def test_cmake_builds_the_library(tmp_path: Path) -> None:
    if shutil.which("cmake") is None:
        pytest.skip("needs cmake")
    run(["cmake", "-S", SOURCES, "-B", tmp_path, "-DDSPARK_WERROR=ON"])
    run(["cmake", "--build", tmp_path, "--parallel", str(os.cpu_count())])
    assert (tmp_path / "libdspark_cpu.so").exists()
