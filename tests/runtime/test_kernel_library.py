"""Finding and compiling the library of sequence kernels."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from dspark_runtime.backends import build_kernels, ort_kernels
from dspark_runtime.backends.ort import load_session
from dspark_runtime.backends.protocol import EngineOptions
from dspark_runtime.errors import BackendError

ONE_FILE = """// flags: -DFROM_FIRST_LINE
#pragma GCC visibility push(default)
#ifdef FROM_FIRST_LINE
extern "C" const char* dspark_cpu_set() { return "small"; }
#endif
extern "C" const char* dspark_cpu_sets() { return "small portable"; }
extern "C" const char* dspark_cpu_error() { return ""; }
extern "C" const char* dspark_cpu_operators() { return "RMSNorm Tanh"; }
"""


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sources of a library with nothing in it."""
    (tmp_path / "sources" / "sets").mkdir(parents=True)
    (tmp_path / "sources" / "sets" / "portable.cpp").write_text(ONE_FILE)
    monkeypatch.setenv(build_kernels.SOURCES_VARIABLE, str(tmp_path / "sources"))
    monkeypatch.setenv(build_kernels.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.delenv(ort_kernels.LIBRARY_VARIABLE, raising=False)
    return tmp_path / "sources"


@pytest.mark.skipif(build_kernels.compiler() is None, reason="needs a C++ compiler")
def test_a_library_is_found_once_it_was_compiled(small: Path) -> None:
    assert ort_kernels.kernel_library() is None
    made = build_kernels.build()
    assert ctypes.CDLL(str(made)) and build_kernels.build() == made
    found = ort_kernels.kernel_library()
    assert found is not None and found.path == made
    assert (found.instruction_set, found.sets) == ("small", ("small", "portable"))
    assert ort_kernels.missing_operators(frozenset({"Tanh", "Silu"})) == {"Silu"}
    (small / "more.h").write_text("// changed sources are another library\n")
    build_kernels._digest.cache_clear()
    assert build_kernels.cached_library(small) != made


@pytest.mark.skipif(build_kernels.compiler() is None, reason="needs a C++ compiler")
def test_a_library_that_does_not_register_is_an_error(small: Path, tmp_path: Path) -> None:
    build_kernels.build()  # a library without RegisterCustomOps
    with pytest.raises(
        BackendError, match=r"refuses the sequence kernels .*RegisterCustomOps.*DSPARK_CPU_LIBRARY=none"
    ):
        load_session(tmp_path / "target.onnx", "target", EngineOptions())


def test_what_the_compiler_says_is_shown(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/no/such/compiler")
    with pytest.raises(BackendError, match=r"cannot be run.*set CXX"):
        build_kernels.build()


def test_without_a_compiler_the_remedy_is_named(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_kernels, "compiler", lambda: None)
    with pytest.raises(BackendError, match=r"pip install ziglang"):
        build_kernels.build()


def test_all_operators_are_missing_without_a_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ort_kernels.LIBRARY_VARIABLE, ort_kernels.NO_LIBRARY)
    assert ort_kernels.kernel_library() is None
    assert ort_kernels.missing_operators(frozenset({"Tanh"})) == {"Tanh"}


def test_what_cannot_be_loaded_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "libdspark_cpu.so"
    broken.write_bytes(b"no library")
    monkeypatch.setenv(ort_kernels.LIBRARY_VARIABLE, str(broken))
    with pytest.raises(BackendError, match=r"cannot be loaded.*DSPARK_CPU_LIBRARY=none"):
        ort_kernels.kernel_library()
