"""The library of sequence kernels, compiled once, and a copy for each instruction set."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from dspark_runtime.backends.ort_kernels import LIBRARY_VARIABLE, NO_LIBRARY
from tests.plugins.cpu.library import Kernels, built_library, sets_that_run


@pytest.fixture(scope="session")
def library() -> Path:
    given = os.environ.get(LIBRARY_VARIABLE, NO_LIBRARY)
    if given != NO_LIBRARY:
        return Path(given)  # built otherwise, see test_sanitizers
    return built_library()


@pytest.fixture(scope="session")
def every_set(library: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Kernels]:
    """All sets that run here, best first; the last one is the portable reference."""
    folder = tmp_path_factory.mktemp("sets")
    names = sets_that_run(library)
    return [Kernels(Path(shutil.copy(library, folder / f"{name}.so")), name) for name in names]


@pytest.fixture(scope="session")
def best(every_set: list[Kernels]) -> Kernels:
    return every_set[0]
