"""Verification inside a TensorRT plan without a library to load, by ahead-of-time Python plugins.

TensorRT embeds the PTX of one kernel per plugin in the plan and launches it itself: one launch, no workspace. The
kernels for that are in plugins/kernels/walk.cu: one block per sequence draws only at the rows it reaches.
``VerifyTree`` and ``VerifyChain`` fit; ``DraftBlock`` takes several launches, ``CompactCache`` a number of tensors that
is not fixed.

Names, inputs and outputs are those of the plugin library and of the ONNX functions.
"""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import tempfile
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dspark_export.engines.failures import compiler_missing
from dspark_runtime.bundle.contract import VERIFY_CHAIN_INPUTS, VERIFY_INPUTS, VERIFY_OUTPUTS
from dspark_runtime.bundle.engine_names import NAMESPACE
from dspark_runtime.errors import EngineBuildError

BLOCK = 512  # threads of a sequence
ARCHITECTURE = "compute_80"  # PTX of the oldest architecture runs on all later ones
OUTPUTS = tuple(spec.name for spec in VERIFY_OUTPUTS)

_SUFFIXES = {"FLOAT": "f32", "HALF": "f16", "BF16": "bf16"}
_ENTRY = re.compile(r"^\.visible \.entry (\w+)\(.*?^}$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class AotPlugin:
    """A plugin and the family of kernels that computes it; a kernel takes ``inputs``, rows, vocab, then ``OUTPUTS``."""

    name: str
    kernels: str
    inputs: tuple[str, ...]

    @property
    def id(self) -> str:
        """What TensorRT registers it under."""
        return f"{NAMESPACE}::{self.name}"

    def kernel(self, dtype: str) -> str:
        """Name of the kernel for logits of a TensorRT type.

        Raises:
            EngineBuildError: no kernel reads this type.
        """
        if dtype not in _SUFFIXES:
            raise EngineBuildError(
                f"{self.name} reads logits in {', '.join(_SUFFIXES)}, not {dtype}; cast them before it"
            )
        return f"{self.kernels}_{_SUFFIXES[dtype]}"


PLUGINS = (
    AotPlugin("VerifyTree", "dspark_walk_tree", tuple(spec.name for spec in VERIFY_INPUTS)),
    AotPlugin("VerifyChain", "dspark_walk_chain", tuple(spec.name for spec in VERIFY_CHAIN_INPUTS)),
)


def compile_ptx(plugins: Path, nvcc: str = "nvcc") -> str:
    """PTX of the walking kernels, from the sources in the folder ``plugins``; CMake's target dspark_ptx does the same.

    Raises:
        EngineBuildError: nvcc cannot be run, or refuses the sources.
    """
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "walk.ptx"
        command = [nvcc, "-std=c++17", "-O3", "-fmad=false", "-ptx", f"-arch={ARCHITECTURE}"]
        command += [f"-I{plugins / 'include'}", str(plugins / "kernels" / "walk.cu"), "-o", str(output)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            raise EngineBuildError(f"{nvcc} cannot be run ({error}); install CUDA's compiler or give PTX") from error
        if done.returncode != 0:
            raise EngineBuildError(f"nvcc refused {plugins / 'kernels' / 'walk.cu'}: {done.stderr.strip()}")
        return output.read_text(encoding="utf-8")


def only_kernel(ptx: str, kernel: str) -> str:
    """``ptx`` with all kernels but ``kernel`` removed, so that a plan holds one.

    Raises:
        EngineBuildError: there is no such kernel.
    """
    found = [entry[1] for entry in _ENTRY.finditer(ptx)]
    if kernel not in found:
        raise EngineBuildError(
            f"the PTX has no kernel {kernel}, only {', '.join(found) or 'none'}; build dspark_ptx anew"
        )
    return _ENTRY.sub(lambda entry: entry[0] if entry[1] == kernel else "", ptx)


def register_aot_plugins(ptx: str) -> None:
    """Make the plugins known to TensorRT, once in a process, before a network that has them is parsed.

    The network is created with the flag ``PREFER_AOT_PYTHON_PLUGINS``.

    Raises:
        CompilerMissing: TensorRT is not installed, or older than 10.10.
        EngineBuildError: ``ptx`` lacks a kernel.
    """
    try:
        tensorrt = importlib.import_module("tensorrt")
        plugin = importlib.import_module("tensorrt.plugin")
    except ImportError as error:
        raise compiler_missing("tensorrt", str(error)) from error
    if not hasattr(plugin, "aot_impl"):
        raise compiler_missing("tensorrt", f"version {tensorrt.__version__} has no ahead-of-time plugins, 10.10 has")
    for each in PLUGINS:
        for suffix in _SUFFIXES:
            only_kernel(ptx, each.kernel(suffix))
        plugin.register(each.id)(description(each, tensorrt, plugin))
        plugin.aot_impl(each.id)(implementation(each, ptx, plugin))


def description(each: AotPlugin, tensorrt: Any, plugin: Any) -> Callable[..., Any]:
    """What ``tensorrt.plugin.register`` decorates: shapes and types of the outputs."""

    def describe(*tensors: Any) -> tuple[Any, ...]:
        tokens = tensors[each.inputs.index("tokens")]
        accepted = plugin.from_shape_expr((tokens.shape_expr[0],), tensorrt.int64)
        return tokens.like(), tokens.like(), accepted

    parameters = [_parameter(name, plugin.TensorDesc) for name in each.inputs]
    return _with_signature(describe, parameters, _three(plugin.TensorDesc))


def implementation(each: AotPlugin, ptx: str, plugin: Any) -> Callable[..., Any]:
    """What ``tensorrt.plugin.aot_impl`` decorates: kernel, PTX, launch and numbers among the arguments."""

    def implement(*arguments: Any) -> tuple[Any, ...]:
        logits = arguments[each.inputs.index("logits")]
        kernel = each.kernel(logits.dtype.name)
        launch = plugin.KernelLaunchParams()
        launch.grid_x = logits.shape_expr[0]
        launch.block_x = BLOCK
        launch.shared_mem = 0
        numbers = plugin.SymIntExprs(2)
        numbers[0] = plugin.SymInt32(logits.shape_expr[1])
        numbers[1] = plugin.SymInt32(logits.shape_expr[2])
        return kernel, only_kernel(ptx, kernel), launch, numbers

    outputs = _parameter("outputs", _three(plugin.TensorDesc))
    parameters = [*(_parameter(name, plugin.TensorDesc) for name in each.inputs), outputs, _parameter("tactic", int)]
    result = types.GenericAlias(tuple, (str, str, plugin.KernelLaunchParams, plugin.SymIntExprs))
    return _with_signature(implement, parameters, result)


def _three(kind: Any) -> Any:
    """The annotation of a tuple of the outputs."""
    return types.GenericAlias(tuple, (kind,) * len(OUTPUTS))


def _parameter(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=annotation)


def _with_signature(
    function: Callable[..., Any], parameters: list[inspect.Parameter], result: Any
) -> Callable[..., Any]:
    """``function`` for callers that read its signature, as TensorRT does, and pass arguments by place or by name."""
    signature = inspect.Signature(parameters, return_annotation=result)

    def called(*args: Any, **kwargs: Any) -> Any:
        return function(*signature.bind(*args, **kwargs).args)

    called.__signature__ = signature  # type: ignore[attr-defined]
    return called
