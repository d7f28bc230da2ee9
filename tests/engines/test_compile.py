"""Engines by the real compiler: TensorRT-RTX needs no GPU to compile."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from dspark_export.engines.listing import read_listing
from dspark_export.engines.options import CompileOptions
from dspark_export.engines.prepare import data_of, prepare
from dspark_export.graphs.decoder import DecoderTrace
from dspark_export.graphs.target import export_target
from dspark_export.passes import all_forms, optimize
from dspark_runtime.bundle.engine_entry import EngineEntry
from tests import tiny_models
from tests.engines.graphs import DTYPES, HEADS, OPTIONS, RANGES, Saved, decoder_graphs, save


def check(saved: Saved, engine: EngineEntry) -> None:
    """The engine is what its graph asks for, by the compiler's own listing and not by the code under test alone."""
    nodes = [
        n.name for n in onnx.load(saved.folder / saved.graphs[engine.graph].file).graph.node if n.op_type == "Attention"
    ]
    log = (saved.folder / engine.log).read_text(encoding="utf-8")
    assert nodes and engine.inspection.attention == len(nodes)
    kernels = [line for line in log.splitlines() if line.startswith("Name: _gemm_mha")]
    fused = sorted(node for line in kernels for node in nodes if f"[ONNX Layer: {node}]" in line)
    assert fused == sorted(nodes * len(engine.profiles))
    layers = "\n".join(line for line in log.splitlines() if line.startswith("Name: "))
    for spec in saved.graphs[engine.graph].outputs:
        if spec.name.startswith("present."):
            assert spec.name in layers and spec.name.replace("present", "past_key_values") not in layers
    assert engine.inspection.aliased == sum(s.name.startswith("present.") for s in saved.graphs[engine.graph].outputs)
    assert engine.build.plan == (saved.folder / engine.file).stat().st_size > 0
    assert engine.build.peak_memory > engine.build.plan and engine.build.scratch > 0
    assert str(saved.folder) not in log


@pytest.mark.parametrize(
    "arch", [pytest.param(arch, marks=pytest.mark.slow) if arch == "gpt_oss" else arch for arch in HEADS]
)
def test_target_and_self_draft_compile(arch: str, tmp_path: Path, llama: Saved) -> None:
    saved = llama if arch == "llama" else decoder_graphs(arch, tmp_path)
    for name in saved.graphs:
        engine = saved.compile(name)
        check(saved, engine)
        assert engine.dtype == str(DTYPES.get(arch, torch.float16)).removeprefix("torch.")
    assert not [path for path in saved.folder.rglob(".*")]


def test_the_engine_has_the_ranges_that_were_asked_for(llama: Saved) -> None:
    engine = llama.compile("target")
    decode, prefill = engine.profiles
    assert (decode.name, prefill.name) == ("decode", "prefill")
    assert decode.dims["tokens"][2] == decode.dims["rows"][2] == RANGES.verify_rows
    assert prefill.dims["tokens"][2] == RANGES.chunk and engine.capacity == RANGES.max_length
    listed = read_listing((llama.folder / engine.log).read_text(encoding="utf-8"))
    for place, profile in enumerate(engine.profiles):
        for spec in llama.graphs["target"].inputs:
            wanted = [[d if isinstance(d, int) else profile.dims[d][k] for d in spec.shape] for k in range(3)]
            assert listed.shapes[spec.name][place] == wanted, spec.name


def test_compute_capabilities_name_the_folder_and_the_manifest(llama: Saved) -> None:
    engine = llama.compile("self_draft", CompileOptions(ranges=RANGES, compute_capabilities=("8.6", "12.0")))
    assert engine.targets == ("8.6", "12.0")
    assert Path(engine.file).parent.name == f"tensorrt-rtx-{engine.version}-sm86-sm120"


def test_weights_packed_for_the_cpu_are_plain_in_the_prepared_graph(tmp_path: Path) -> None:
    _, model = tiny_models.make("llama", dtype=torch.float16, num_hidden_layers=2, **HEADS["llama"])
    graph = optimize(export_target(DecoderTrace(model)))
    forms = {"plain": graph.clone()} | {v: g for _, v, g in all_forms({"target": graph}, 128, kernels=True)}
    found = []
    for form in ("plain", "standard"):
        saved = save(tmp_path / form, {"target": forms[form]})
        prepared = saved.folder / "onnx" / ".target.engine.onnx"
        prepare(saved.graphs["target"], saved.folder, OPTIONS.ranges, prepared)
        assert data_of(prepared).exists() == (form == "standard")
        found.append(onnx.load(prepared).graph)
    plain, unpacked = ({t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer} for graph in found)
    assert plain.keys() == unpacked.keys() and all(np.array_equal(plain[name], unpacked[name]) for name in plain)
    assert [n.op_type for n in found[0].node] == [n.op_type for n in found[1].node]


def test_the_prepared_graph_has_a_fixed_cache(llama: Saved, tmp_path: Path) -> None:
    entry = llama.graphs["target"]
    prepared = prepare(entry, llama.folder, OPTIONS.ranges, llama.folder / "onnx" / "prepared.onnx")
    graph = onnx.load(prepared.path, load_external_data=False).graph
    shapes = [value.type.tensor_type.shape.dim for value in (*graph.input, *graph.output)]
    assert not [dim for shape in shapes for dim in shape if dim.dim_param == "capacity"]
    assert sum(dim.dim_value == RANGES.max_length for shape in shapes for dim in shape) == 8
    prepared.path.unlink()
