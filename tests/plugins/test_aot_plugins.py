"""Plugins embedded in a plan: their kernels' arguments, their PTX, and what TensorRT would be told.

TensorRT's Python module is the real one, which checks names, signatures and types; its library needs a GPU and
stays out.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from dspark_export.engines import aot_plugins
from dspark_export.engines.aot_plugins import PLUGINS, AotPlugin, compile_ptx, only_kernel, register_aot_plugins
from dspark_export.graphs.verify import build_verify_chain_model, build_verify_model
from dspark_runtime.errors import CompilerMissing, EngineBuildError
from tests.plugins.conftest import PLUGINS as FOLDER

TYPES = ("FLOAT", "HALF", "BF16")


@pytest.fixture(scope="module")
def ptx() -> str:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("needs nvcc to compile the kernels; none is on the path")
    return compile_ptx(FOLDER, nvcc)


def short_ptx() -> str:
    """PTX with the kernels' names and nothing in them."""
    entries = (
        f".visible .entry {each.kernel(dtype)}(\n\t.param .u64 a\n)\n{{\n\tret;\n}}\n"
        for each in PLUGINS
        for dtype in TYPES
    )
    return "//\n.version 9.0\n.target sm_80\n.address_size 64\n\n" + "\n".join(entries)


@pytest.mark.parametrize("each", PLUGINS, ids=lambda each: each.name)
def test_inputs_are_those_of_the_onnx_function(each: AotPlugin) -> None:
    model = build_verify_model() if each.name == "VerifyTree" else build_verify_chain_model()
    [function] = [f for f in model.functions.values() if f.name == each.name]
    assert tuple(value.name for value in function.inputs) == each.inputs
    assert tuple(value.name for value in function.outputs) == aot_plugins.OUTPUTS


@pytest.mark.parametrize("each", PLUGINS, ids=lambda each: each.name)
def test_a_kernel_takes_inputs_numbers_and_outputs(ptx: str, each: AotPlugin) -> None:
    for dtype in TYPES:
        kernel = each.kernel(dtype)
        alone = only_kernel(ptx, kernel)
        assert re.findall(r"\.entry (\w+)", alone) == [kernel]
        assert ".target sm_80" in alone and ".extern" not in alone and "call" not in alone
        head = alone[alone.index(".entry") :].split(")")[0]
        taken = re.findall(r"\.param \.(\w+)", head)
        assert taken == ["u64"] * len(each.inputs) + ["u32"] * 2 + ["u64"] * 3
        assert f".maxntid {aot_plugins.BLOCK}," in alone


class Standin(ModuleType):
    """TensorRT's module without its library: TensorRT-RTX has most of the same classes, the rest are empty."""

    __version__ = "11.4"
    __path__: list[str] = []  # noqa: RUF012

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        rtx = importlib.import_module("tensorrt_rtx")
        setattr(self, name, getattr(rtx, name, None) or type(name, (), {}))
        return vars(self)[name]


@pytest.fixture
def tensorrt_plugin(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module ``tensorrt.plugin`` as TensorRT ships it, which checks what it is given; its library is not loaded."""
    for name in ("tensorrt_rtx", "tensorrt_bindings"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"needs {name} (extra `dev`), which is for Linux on x86-64 only")
    found = importlib.util.find_spec("tensorrt_bindings")
    assert found is not None and found.submodule_search_locations
    folder = Path(found.submodule_search_locations[0]) / "plugin"
    for name in [name for name in sys.modules if name.split(".")[0] == "tensorrt"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorrt", Standin("tensorrt"))
    spec = importlib.util.spec_from_file_location(
        "tensorrt.plugin", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "tensorrt.plugin", module)
    spec.loader.exec_module(module)
    return module


def tensors_of(each: AotPlugin, plugin: ModuleType, dtype: str) -> list[Any]:
    """Descriptions of inputs as TensorRT makes them before it knows any size."""
    trt, shapes = sys.modules["tensorrt"], sys.modules["tensorrt.plugin._tensor"].ShapeExprs
    ranks = {"logits": 3, "draft_probs": 3, "ancestors": 3, "temperature": 1, "drafted": 1}
    made = []
    for name in each.inputs:
        tensor = plugin.TensorDesc()
        tensor.dtype = getattr(trt.DataType, dtype) if name == "logits" else trt.int64
        tensor.shape_expr = shapes(ranks.get(name, 2), _is_dummy=True)
        tensor._immutable = True
        made.append(tensor)
    return made


@pytest.mark.parametrize("each", PLUGINS, ids=lambda each: each.name)
def test_tensorrt_takes_what_it_is_told(tensorrt_plugin: ModuleType, each: AotPlugin) -> None:
    register_aot_plugins(short_ptx())
    lib = sys.modules["tensorrt.plugin._lib"]
    assert {"dspark::VerifyTree", "dspark::VerifyChain"} == set(lib.QDP_REGISTRY)
    known = lib.QDP_REGISTRY[each.id]
    assert tuple(known.input_tensor_names) == each.inputs and known.num_outputs == len(aot_plugins.OUTPUTS)
    for dtype, kernel in (("HALF", f"{each.kernels}_f16"), ("BF16", f"{each.kernels}_bf16")):
        tensors = tensors_of(each, tensorrt_plugin, dtype)
        outputs = known.register_func(*tensors)
        assert [len(out.shape_expr) for out in outputs] == [2, 2, 1]
        assert [out.dtype.name for out in outputs] == ["INT64"] * 3
        name, code, launch, numbers = known.aot_impl_func(*tensors, outputs, 0)
        assert name == kernel and re.findall(r"\.entry (\w+)", code) == [kernel]
        assert isinstance(launch, tensorrt_plugin.KernelLaunchParams)
        assert isinstance(numbers, tensorrt_plugin.SymIntExprs) and len(numbers) == 2
        assert all(isinstance(number, tensorrt_plugin.SymInt32) for number in numbers)
    with pytest.raises(EngineBuildError, match="reads logits in FLOAT, HALF, BF16, not INT8"):
        known.aot_impl_func(*tensors_of(each, tensorrt_plugin, "INT8"), (), 0)


def test_grid_and_numbers_are_those_of_the_logits() -> None:
    numbers: list[Any] = [None, None]
    plugin = SimpleNamespace(
        TensorDesc=object,
        KernelLaunchParams=SimpleNamespace,
        SymIntExprs=lambda count: numbers,
        SymInt32=lambda value: ("int32", value),
    )
    implement = aot_plugins.implementation(PLUGINS[0], short_ptx(), plugin)
    logits = SimpleNamespace(dtype=SimpleNamespace(name="HALF"), shape_expr=("batch", "rows", "vocab"))
    _, _, launch, _ = implement(logits, *PLUGINS[0].inputs[1:], outputs=(), tactic=0)
    assert vars(launch) == {"grid_x": "batch", "block_x": aot_plugins.BLOCK, "shared_mem": 0}
    assert numbers == [("int32", "rows"), ("int32", "vocab")]


def test_what_is_missing_is_named(tensorrt_plugin: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EngineBuildError, match="no kernel dspark_walk_tree_f32, only none"):
        register_aot_plugins("")
    assert not sys.modules["tensorrt.plugin._lib"].QDP_REGISTRY
    monkeypatch.delattr(tensorrt_plugin, "aot_impl")
    with pytest.raises(CompilerMissing, match=r"version 11\.4 has no ahead-of-time plugins"):
        register_aot_plugins(short_ptx())


def test_without_tensorrt_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(aot_plugins.importlib, "import_module", missing)
    with pytest.raises(CompilerMissing, match="engines of tensorrt need its compiler"):
        register_aot_plugins(short_ptx())


def test_without_nvcc_it_says_so(tmp_path: Any) -> None:
    with pytest.raises(EngineBuildError, match="cannot be run"):
        compile_ptx(FOLDER, str(tmp_path / "nvcc"))
