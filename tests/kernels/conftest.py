"""The library of sequence kernels, and graphs of every architecture in the form for it."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from filelock import FileLock

from dspark_export.bundle.weights import save_graphs
from dspark_export.graphs.target import export_target
from dspark_export.passes import all_forms, optimize
from dspark_export.passes.precision import PrecisionSettings, apply_precision
from dspark_runtime.backends import build_kernels
from dspark_runtime.bundle.precisions import Weights
from tests.plugins.cpu.library import built_library, compile_library, registered_otherwise
from tests.traced import traced


@pytest.fixture(scope="session")
def library() -> Path:
    return built_library()


@pytest.fixture(scope="session")
def other_library(library: Path) -> Callable[[str], Path]:
    """The library with an option of the compiler for what it registers. Quick to compile, slow to run; kept as long."""
    folder = build_kernels.cache() / f"tests-{library.parent.name}"

    def compiled(option: str) -> Path:
        made = folder / f"{hashlib.sha256(option.encode()).hexdigest()[:16]}.so"
        with FileLock(build_kernels.cache() / "tests.lock"):
            folder.mkdir(exist_ok=True)
            if not (whole := folder / "whole.so").is_file():
                compile_library(whole, "-O0")
            return made if made.is_file() else registered_otherwise(whole, made, option)

    return compiled


@dataclass(frozen=True)
class Forms:
    """Files of one model's target, by variant; ``left``: nodes without a kernel, ``kernels``: the operators called."""

    files: dict[str, Path]
    left: dict[str, int]
    kernels: tuple[str, ...]


@pytest.fixture(scope="session")
def forms(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Weights], Forms]:
    from dspark_export.passes import kernels_of, without_kernel

    @functools.cache
    def made(arch: str, precision: Weights) -> Forms:
        model, trace = traced(arch)
        graph = optimize(export_target(trace))
        apply_precision(graph, PrecisionSettings(precision))
        positions = model.config.get_text_config().max_position_embeddings
        shipped = {variant: form for _, variant, form in all_forms({"target": graph}, positions, kernels=True)}
        files = save_graphs(shipped, tmp_path_factory.mktemp(f"{arch}-{precision}"))
        kernels = shipped["sequence-kernels"]
        return Forms(files, without_kernel(kernels), kernels_of(kernels))

    return made
