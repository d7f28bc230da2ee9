"""Builds the sequence kernels and runs single operators of them in ONNX Runtime."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnxruntime as ort
import pytest
from filelock import FileLock
from onnx import TensorProto, helper, numpy_helper

from dspark_runtime.backends import build_kernels

Array = np.ndarray[Any, Any]

SOURCES = Path(__file__).resolve().parents[3] / "plugins" / "cpu"
WARNINGS = ("-Wall", "-Wextra", "-Werror")
FLAGS = (*build_kernels.FLAGS, *WARNINGS)
SETS = {"x86_64": ("portable", "avx2", "avxvnni", "avx512"), "aarch64": ("portable", "neon")}
_TYPES = {
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.float16): TensorProto.FLOAT16,
    np.dtype(ml_dtypes.bfloat16): TensorProto.BFLOAT16,
    np.dtype(np.uint8): TensorProto.UINT8,
    np.dtype(np.int64): TensorProto.INT64,
    np.dtype(bool): TensorProto.BOOL,
}

DRAFT_TYPES = (np.int64, np.float32) * 4
"""Element types of what MarkovDraft and BlockDraft give."""


def own_flags(source: Path) -> list[str]:
    """The flags that a file of sets/ asks for in its first line."""
    first = source.read_text(encoding="utf-8").splitlines()[0]
    return first.removeprefix("// flags:").split() if first.startswith("// flags:") else []


def built_library() -> Path:
    """The library as users compile it, but no warning may be left; made once for all workers and for later runs."""
    command = build_kernels.compiler()
    if build_kernels.sources() is None or command is None:
        pytest.skip("the sequence kernels need their sources and a C++ compiler")
    build_kernels.cache().mkdir(parents=True, exist_ok=True)
    with FileLock(build_kernels.cache() / "tests.lock"), pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXX", shlex.join([*command, *WARNINGS]))
        return build_kernels.build()


def compile_library(
    output: Path, *options: str, compiler: str = "g++", machine: str = platform.machine(), extra: tuple[Path, ...] = ()
) -> Path:
    """Compile and link into ``output``: a shared library, or a program where ``extra`` has its main function."""
    if shutil.which(compiler) is None:
        pytest.skip(f"needs {compiler}; it is not on the path")
    sets = [SOURCES / "sets" / f"{name}.cpp" for name in SETS[machine]]
    sources = [SOURCES / "choose.cpp", *sets, *(extra or sorted((SOURCES / "ort").glob("*.cpp")))]
    objects = [output.parent / f"{output.name}.{source.stem}.o" for source in sources]

    def one(source: Path, target: Path) -> None:
        _run(compiler, *FLAGS, f"-I{SOURCES}", *own_flags(source), *options, "-c", source, "-o", target)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(one, sources, objects))
    _run(compiler, *options, *([] if extra else ["-shared"]), *objects, "-o", output)
    return output


def registered_otherwise(library: Path, output: Path, *options: str) -> Path:
    """Link ``output`` from the object files of ``library``, with register.cpp compiled again with ``options``."""
    own = output.parent / f"{output.name}.register.o"
    _run("g++", *FLAGS, f"-I{SOURCES}", *options, "-c", SOURCES / "ort" / "register.cpp", "-o", own)
    others = (path for path in library.parent.glob(f"{library.name}.*.o") if path.name != f"{library.name}.register.o")
    _run("g++", "-shared", *sorted(others), own, "-o", output)
    return output


def _run(*command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


class Kernels:
    """One loaded library with one instruction set."""

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name = path, name
        self._first = True

    def options(self, threads: int) -> ort.SessionOptions:
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = threads
        options.enable_cpu_mem_arena = False  # so that a sanitizer sees each tensor's bounds
        before = os.environ.get("DSPARK_CPU")
        os.environ["DSPARK_CPU"] = self.name
        try:
            options.register_custom_ops_library(str(self.path))
        finally:
            if before is None:
                del os.environ["DSPARK_CPU"]
            else:
                os.environ["DSPARK_CPU"] = before
        return options

    def session(
        self,
        operator: str,
        inputs: dict[str, Array],
        outputs: int = 1,
        *,
        threads: int = 1,
        output_types: tuple[Any, ...] = (),
        **attributes: Any,
    ) -> ort.InferenceSession:
        """A model of one node; ``inputs`` in order. bfloat16 inputs become constants. Outputs are floats by default."""
        names = [f"out{i}" for i in range(outputs)]
        node = helper.make_node(operator, list(inputs), names, domain="dspark", **attributes)
        fed = [
            helper.make_tensor_value_info(name, _TYPES[a.dtype], [None] * a.ndim)
            for name, a in inputs.items()
            if a.dtype != ml_dtypes.bfloat16
        ]
        types = [_TYPES[np.dtype(t)] for t in output_types] or [TensorProto.FLOAT] * outputs
        made = [helper.make_tensor_value_info(name, t, None) for name, t in zip(names, types, strict=True)]
        constants = [numpy_helper.from_array(a, n) for n, a in inputs.items() if a.dtype == ml_dtypes.bfloat16]
        graph = helper.make_graph([node], operator, fed, made, constants)
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", 24), helper.make_opsetid("dspark", 1)], ir_version=11
        )
        return ort.InferenceSession(
            model.SerializeToString(), self.options(threads), providers=["CPUExecutionProvider"]
        )

    def run(
        self,
        operator: str,
        inputs: dict[str, Array],
        outputs: int = 1,
        *,
        threads: int = 1,
        output_types: tuple[Any, ...] = (),
        **attributes: Any,
    ) -> list[Array]:
        """Outputs of one run."""
        session = self.session(operator, inputs, outputs, threads=threads, output_types=output_types, **attributes)
        result: list[Array] = session.run(None, {n: a for n, a in inputs.items() if a.dtype != ml_dtypes.bfloat16})
        return result


@functools.cache
def sets_that_run(path: Path) -> tuple[str, ...]:
    """Names of the instruction sets that run on this machine, best first."""
    return _names(path, "dspark_cpu_sets")


def operators_of(path: Path) -> tuple[str, ...]:
    """Names of the operators that the library says it registers, in its order."""
    return _names(path, "dspark_cpu_operators")


def _names(path: Path, function: str) -> tuple[str, ...]:
    export = getattr(ctypes.CDLL(str(path)), function)
    export.restype = ctypes.c_char_p
    names: bytes = export()
    return tuple(names.decode().split())
