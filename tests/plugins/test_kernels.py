"""The kernels compile with nvcc and do not spill; the kept report is of these kernels; what CMake says."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.plugins.conftest import PLUGINS

PTXAS = """
ptxas info    : Compiling entry function 'dspark_a' for 'sm_90'
ptxas info    : Function properties for dspark_a
    {stack} bytes stack frame, {spilled} bytes spill stores, {spilled} bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 16665 bytes smem
"""


@pytest.fixture(scope="module")
def resources() -> ModuleType:
    spec = importlib.util.spec_from_file_location("dspark_plugin_resources", PLUGINS / "resources.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def names_in_sources() -> set[str]:
    text = "".join(path.read_text(encoding="utf-8") for path in (PLUGINS / "kernels").glob("*.cu"))
    suffixes = {
        name: re.findall(rf"^DSPARK_{name}_KERNELS\((\w+),", text, re.MULTILINE) for name in ("VERIFY", "WALK", "DRAFT")
    }
    suffixes["COMPACT"] = re.findall(r"^DSPARK_COMPACT_KERNELS\((\w+),", text, re.MULTILINE)
    plain = re.findall(r"DSPARK_KERNEL\(\d\)\s*\\?\s*(dspark_\w+)\(", text)
    found = set(plain)
    for stem in re.findall(r"DSPARK_KERNEL\(\d\)\s*\\?\s*(dspark_\w+?)_?##suffix", text):
        family = stem.split("_")[1].upper()
        found |= {f"{stem}_{s}" for s in suffixes[family]}
    return found


def compiled(resources: ModuleType, architecture: int) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("needs nvcc to compile the kernels; none is on the path")
    found = resources.compile_kernels(nvcc, architecture)
    assert set(found) == names_in_sources()
    assert resources.spilling(found) == []


def test_they_compile_and_do_not_spill(resources: ModuleType) -> None:
    compiled(resources, 90)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 86, 89, 100, 120])
def test_so_they_do_for_every_architecture(resources: ModuleType, architecture: int) -> None:
    compiled(resources, architecture)


def test_the_kept_report_is_of_these_kernels(resources: ModuleType) -> None:
    report = json.loads((PLUGINS / "resources.json").read_text(encoding="utf-8"))
    assert list(report) == [f"sm_{number}" for number in resources.ARCHITECTURES]
    for kernels in report.values():
        assert set(kernels) == names_in_sources()
        assert all(kernel["spill_bytes"] == 0 and kernel["shared_bytes"] <= 48 * 1024 for kernel in kernels.values())


@pytest.mark.parametrize(("spilled", "code"), [(0, 0), (16, 1)])
def test_a_spill_fails(tmp_path: Path, spilled: int, code: int) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(f"#!/bin/sh\ncat <<'E'\n{PTXAS.format(stack=spilled, spilled=spilled)}\nE\n", encoding="utf-8")
    nvcc.chmod(0o755)
    report = tmp_path / "report.json"
    command = [sys.executable, str(PLUGINS / "resources.py"), "--nvcc", str(nvcc), "--architectures", "90"]
    done = subprocess.run([*command, "--report", str(report)], capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert ("spills registers: sm_90: dspark_a (32 bytes)" in done.stderr) == bool(spilled)
    kernel = {"registers": 64, "shared_bytes": 16665, "stack_bytes": spilled, "spill_bytes": 2 * spilled}
    assert json.loads(report.read_text(encoding="utf-8")) == {"sm_90": {"dspark_a": kernel}}


def test_without_figures_or_nvcc_it_says_so(resources: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(resources.CompilerError, match="no figures for kernel dspark_a"):
        resources.parse("Compiling entry function 'dspark_a' for 'sm_90'\nsomething else")
    with pytest.raises(resources.CompilerError, match="give nvcc's path"):
        resources.compile_kernels(str(tmp_path / "none"), 90)


def test_cmake_says_what_is_missing(tmp_path: Path) -> None:
    cmake, ninja = shutil.which("cmake"), shutil.which("ninja")
    if cmake is None or ninja is None or shutil.which("g++") is None:
        pytest.skip("needs cmake, ninja and g++")
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("cmake", "ninja", "g++", "gcc", "ld", "as", "ar", "ranlib", "sh", "uname"):
        if found := shutil.which(tool):
            (tools / tool).symlink_to(found)
    environment = {k: v for k, v in os.environ.items() if k not in ("CUDACXX", "CUDA_PATH")} | {"PATH": str(tools)}
    command = [cmake, "-G", "Ninja", "-S", str(PLUGINS), "-B", str(tmp_path / "build")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "No kernels: nvcc was not found; set CMAKE_CUDA_COMPILER to its path" in done.stdout
    required = subprocess.run(
        [*command, "-DDSPARK_REQUIRE_PLUGINS=ON"], env=environment, capture_output=True, text=True, check=False
    )
    assert required.returncode != 0 and "nvcc was not found" in required.stderr
