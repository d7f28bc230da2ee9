"""Graphs broken on purpose, and what is said about them. The complaints are those of the real compiler."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from onnx import helper

from dspark_export.engines import compiler
from dspark_export.engines.compile import compile_bundle
from dspark_export.engines.inspection import inspect
from dspark_export.engines.options import CompileOptions, Ranges
from dspark_export.engines.prepare import PreparedGraph, prepare
from dspark_runtime import errors
from dspark_runtime.bundle.files import BundleFiles
from tests.engines.graphs import OPTIONS, Saved, decoder_graphs


@pytest.fixture
def broken(llama: Saved, tmp_path: Path) -> Callable[[Callable[[onnx.GraphProto], None]], Saved]:
    """Saves a copy of the model's graphs in which ``edit`` changed the target."""

    def save(edit: Callable[[onnx.GraphProto], None]) -> Saved:
        folder = Path(shutil.copytree(llama.folder, tmp_path / "broken"))
        path = folder / llama.graphs["target"].file
        model = onnx.load(path, load_external_data=False)
        edit(model.graph)
        onnx.save(model, path)
        return dataclasses.replace(llama, folder=folder)

    return save


def node_of(graph: onnx.GraphProto, operator: str) -> onnx.NodeProto:
    return next(node for node in graph.node if node.op_type == operator)


def test_an_unsupported_operator_is_named(broken: Callable[..., Saved]) -> None:
    def edit(graph: onnx.GraphProto) -> None:
        distinct = helper.make_node("Unique", ["input_ids"], ["distinct_ids"], name="distinct")
        cast = helper.make_node("Cast", ["distinct_ids"], ["extra"], to=onnx.TensorProto.FLOAT, name="widened")
        graph.node.extend([distinct, cast])
        graph.output.append(helper.make_tensor_value_info("extra", onnx.TensorProto.FLOAT, ["distinct"]))

    with pytest.raises(errors.UnsupportedNode, match=r"node distinct \(Unique, tensor distinct_ids\) of graph target"):
        broken(edit).compile("target")


def test_a_cache_that_is_not_written_in_place_is_named(broken: Callable[..., Saved]) -> None:
    def edit(graph: onnx.GraphProto) -> None:
        scatter = node_of(graph, "TensorScatter")
        scatter.name = "first_scatter"
        half = helper.make_tensor("two", onnx.TensorProto.FLOAT16, [], [2.0])
        between = helper.make_node("Mul", [scatter.input[0], "two"], ["doubled"], name="between")
        graph.initializer.append(half)
        graph.node.insert(0, between)
        scatter.input[0] = "doubled"

    with pytest.raises(
        errors.EngineBuildError, match=r"first_scatter \(TensorScatter, tensor present\.0\.key\)"
    ) as caught:
        broken(edit).compile("target")
    assert "A cache has to be a direct input" in str(caught.value)
    assert "first_scatter" in str(caught.value.__cause__)


def test_shapes_that_do_not_fit_are_named(broken: Callable[..., Saved]) -> None:
    def edit(graph: onnx.GraphProto) -> None:
        products = [node for node in graph.node if node.op_type == "MatMul"]
        wide = next(n for n in products if n.input[1].endswith("mlp.down_proj.weight"))
        wide.name = "swapped_product"
        wide.input[1] = next(n.input[1] for n in products if n.input[1].endswith("mlp.gate_up_proj.weight"))

    with pytest.raises(errors.EngineBuildError, match=r"swapped_product \(MatMul, tensor \w+\) of graph target"):
        broken(edit).compile("target")


def test_an_attention_without_a_kernel_is_named(tmp_path: Path) -> None:
    saved = decoder_graphs("llama", tmp_path, overrides={"head_dim": 264})
    with pytest.raises(errors.AttentionNotFused, match=r"of graph target.*ONNX Runtime"):
        saved.compile("target")


def test_float32_is_refused_before_anything_is_compiled(llama: Saved, tmp_path: Path) -> None:
    entry = llama.graphs["target"].model_copy(update={"dtype": "float32"})
    with pytest.raises(errors.EnginePrecisionError, match="--precision fp16 or bf16"):
        prepare(entry, tmp_path, OPTIONS.ranges, tmp_path / "never.onnx")
    assert not list(tmp_path.iterdir())


def test_an_unknown_dimension_is_named(llama: Saved) -> None:
    entry = llama.graphs["target"]
    first = dataclasses.replace(entry.inputs[0], shape=("batch", "words"))
    entry = entry.model_copy(update={"inputs": (first, *entry.inputs[1:])})
    with pytest.raises(errors.EngineBuildError, match=r"input input_ids .* 'words'"):
        prepare(entry, llama.folder, OPTIONS.ranges, llama.folder / "onnx" / "never.onnx")
    (llama.folder / "onnx" / "never.onnx").unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (lambda: Ranges(batch=0), "--batch 0"),
        (lambda: Ranges(max_length=64, chunk=65), "--chunk 65"),
        (lambda: Ranges(max_length=8, chunk=8, verify_rows=9), "--verify-rows 9"),
        (lambda: CompileOptions(compute_capabilities=("9.0",)), "--compute-capability 9.0"),
        (lambda: CompileOptions(compute_capabilities=("8.6", "8.6")), "twice"),
        (lambda: CompileOptions(version_compatible=True), "--version-compatible"),
        (lambda: CompileOptions(hardware_compatible="ampere-plus"), "--hardware-compatible"),
        (lambda: CompileOptions(flavour="tensorrt", compute_capabilities=("8.6",)), "--compute-capability"),
        (lambda: CompileOptions(flavour="openvino"), "--backend openvino"),
    ],
)
def test_wrong_options(options: Callable[[], object], words: str) -> None:
    with pytest.raises(errors.UsageError, match=words):
        options()


def prepared_target(llama: Saved, name: str) -> PreparedGraph:
    return prepare(llama.graphs["target"], llama.folder, OPTIONS.ranges, llama.folder / "onnx" / f".{name}.onnx")


def test_engines_that_came_out_wrong_are_found(llama: Saved, tmp_path: Path) -> None:
    """The compiler's answer about a good engine, with one fact after the other made bad."""
    graph = prepared_target(llama, "wrong")
    done = compiler.compile_graph(graph, OPTIONS, tmp_path / "plan", tmp_path / "log", lambda *_: None)
    assert inspect(graph, done).attention == 2
    listing = done["listing"]
    assert "_gemm_mha" in listing
    bad = [
        ({"listing": listing.replace("_gemm_mha", "_gemm_softmax_gemm")}, errors.AttentionNotFused, "node_attention"),
        ({"listing": listing.replace("present.0.key", "past_key_values.0.key", 1)}, errors.CacheNotInPlace, "copied"),
        ({"listing": listing.replace("MaxShape: [2,32]", "MaxShape: [2,31]")}, errors.ProfileMismatch, "prefill"),
        ({"listing": ""}, errors.EngineBuildError, "did not list"),
        ({"network": done["network"] | {"decomposable": 1}}, errors.AttentionNotFused, "decomposable"),
        ({"network": done["network"] | {"caches": {}}}, errors.CacheNotInPlace, r"present\.0\.key"),
    ]
    for change, error, words in bad:
        with pytest.raises(error, match=words):
            inspect(graph, done | change)
    graph.path.unlink()


def test_a_compiler_that_dies_is_an_error(llama: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = subprocess.Popen

    def started(command: list[str], **settings: object) -> subprocess.Popen[str]:
        process: subprocess.Popen[str] = real(command, **settings)  # type: ignore[call-overload]
        os.kill(process.pid, signal.SIGKILL)
        return process

    graph = prepared_target(llama, "dies")
    monkeypatch.setattr(subprocess, "Popen", started)
    with pytest.raises(errors.CompilerCrashed, match="killed by signal 9 on graph target; it may have run out"):
        compiler.compile_graph(graph, OPTIONS, tmp_path / "plan", tmp_path / "log", lambda *_: None)
    graph.path.unlink()


def test_a_compiler_that_is_not_installed_is_an_error(llama: Saved) -> None:
    if shutil.which("trtexec"):
        pytest.skip("TensorRT seems to be installed here")
    with pytest.raises(errors.CompilerMissing, match="pip install tensorrt polygraphy"):
        llama.compile("target", CompileOptions(flavour="tensorrt", ranges=OPTIONS.ranges))


def test_a_failed_compilation_leaves_the_bundle_as_it_was(compiled: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(compiled, tmp_path / "bundle"))
    before = {path.relative_to(bundle): path.read_bytes() for path in bundle.rglob("*") if path.is_file()}

    def stop(graph: str, phase: str, step: int, steps: int) -> None:
        if graph == "self_draft":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compile_bundle(bundle, OPTIONS, stop)
    after = {path.relative_to(bundle): path.read_bytes() for path in bundle.rglob("*") if path.is_file()}
    assert after == before and [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_what_is_asked_for_must_be_there(compiled: Path) -> None:
    with pytest.raises(errors.UsageError, match=r"--graph other is not a graph .* choose target, self_draft, verify"):
        compile_bundle(compiled, CompileOptions(graphs=("other",), ranges=OPTIONS.ranges))
    with pytest.raises(errors.UsageError, match="--max-length 4096 is more than the 512 positions"):
        compile_bundle(compiled, CompileOptions())
    assert len(BundleFiles.open(compiled).manifest.engines) == 2
