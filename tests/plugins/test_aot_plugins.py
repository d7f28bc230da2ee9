"""Plugins embedded in a plan: their kernels' arguments, their PTX, and what TensorRT would be told.

TensorRT itself cannot be installed where these tests run: a recorder stands where its module ``tensorrt.plugin`` would.
"""

from __future__ import annotations

import inspect
import re
import shutil
from types import SimpleNamespace
from typing import Any, get_args

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


class Exprs(list[Any]):
    def __init__(self, count: int) -> None:
        super().__init__([None] * count)


class TensorDesc:
    def __init__(self, shape_expr: tuple[Any, ...], dtype: Any) -> None:
        self.shape_expr, self.dtype = shape_expr, dtype

    def like(self) -> TensorDesc:
        return TensorDesc(self.shape_expr, self.dtype)


class Recorder:
    """Keeps what is registered under which name."""

    TensorDesc = TensorDesc
    KernelLaunchParams = SimpleNamespace
    SymIntExprs = Exprs

    def __init__(self) -> None:
        self.registered: dict[str, Any] = {}
        self.implemented: dict[str, Any] = {}

    def register(self, name: str) -> Any:
        return lambda function: self.registered.setdefault(name, function)

    def aot_impl(self, name: str) -> Any:
        return lambda function: self.implemented.setdefault(name, function)

    @staticmethod
    def from_shape_expr(shape: tuple[Any, ...], dtype: Any) -> TensorDesc:
        return TensorDesc(shape, dtype)

    @staticmethod
    def SymInt32(value: Any) -> tuple[str, Any]:
        return ("int32", value)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    found = Recorder()
    modules = {"tensorrt": SimpleNamespace(int64="int64", __version__="10.13"), "tensorrt.plugin": found}
    monkeypatch.setattr(aot_plugins.importlib, "import_module", modules.__getitem__)
    return found


@pytest.mark.parametrize("each", PLUGINS, ids=lambda each: each.name)
def test_what_tensorrt_is_told(recorder: Recorder, each: AotPlugin) -> None:
    register_aot_plugins(short_ptx())
    assert set(recorder.registered) == set(recorder.implemented) == {"dspark::VerifyTree", "dspark::VerifyChain"}
    describe, implement = recorder.registered[each.id], recorder.implemented[each.id]
    signature = inspect.signature(describe)
    assert tuple(signature.parameters) == each.inputs
    assert all(p.annotation is TensorDesc for p in signature.parameters.values())
    assert get_args(signature.return_annotation) == (TensorDesc,) * 3
    assert [*inspect.signature(implement).parameters] == [*each.inputs, "outputs", "tactic"]

    tensors = {name: TensorDesc(("batch",), SimpleNamespace(name="FLOAT")) for name in each.inputs}
    tensors["tokens"] = TensorDesc(("batch", "rows"), "int64")
    for dtype, kernel in (("HALF", f"{each.kernels}_f16"), ("BF16", f"{each.kernels}_bf16")):
        tensors["logits"] = TensorDesc(("batch", "rows", "vocab"), SimpleNamespace(name=dtype))
        outputs = describe(*tensors.values())
        assert [out.shape_expr for out in outputs] == [("batch", "rows"), ("batch", "rows"), ("batch",)]
        assert [out.dtype for out in outputs] == ["int64"] * 3
        name, code, launch, numbers = implement(**tensors, outputs=outputs, tactic=0)
        assert name == kernel and re.findall(r"\.entry (\w+)", code) == [kernel]
        assert vars(launch) == {"grid_x": "batch", "block_x": aot_plugins.BLOCK, "shared_mem": 0}
        assert numbers == [("int32", "rows"), ("int32", "vocab")]
    tensors["logits"] = TensorDesc(("batch", "rows", "vocab"), SimpleNamespace(name="INT8"))
    with pytest.raises(EngineBuildError, match="reads logits in FLOAT, HALF, BF16, not INT8"):
        implement(**tensors, outputs=(), tactic=0)


def test_what_is_missing_is_named(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EngineBuildError, match="no kernel dspark_walk_tree_f32, only none"):
        register_aot_plugins("")
    assert recorder.registered == {}
    monkeypatch.delattr(Recorder, "aot_impl")
    with pytest.raises(CompilerMissing, match=r"version 10\.13 has no ahead-of-time plugins"):
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
