"""What every exported graph must look like, whatever the model."""

from __future__ import annotations

import functools
import re
from collections import Counter

import onnx
import onnx_ir as ir
import pytest
import torch

from dspark_export.graphs.decoder import DecoderTrace
from dspark_export.graphs.self_draft import export_self_draft
from dspark_export.graphs.target import export_target
from dspark_export.tracing.geometry import probe
from dspark_export.tracing.tidy import SCOPES_KEY
from dspark_runtime.bundle.contract import decoder_contract
from dspark_runtime.errors import UsageError
from tests import tiny_models

SHARED = ("qwen3", "gemma2", "deepseek_v2")


@pytest.fixture(scope="module", params=SHARED)
def traced(request: pytest.FixtureRequest) -> tuple[str, DecoderTrace]:
    _, model = tiny_models.make(request.param)
    return request.param, DecoderTrace(model)


def names(values: list[ir.Value]) -> list[str | None]:
    return [value.name for value in values]


def test_inputs_and_outputs_are_the_contracts(traced: tuple[str, DecoderTrace]) -> None:
    arch, trace = traced
    cache = probe(tiny_models.config(arch))
    for graph, layers, taps in (
        (export_target(trace), None, 0),
        (export_target(trace, taps=(2, -1)), None, 2),
        (export_self_draft(trace, (1,)), (1,), 0),
        (export_self_draft(trace, (0, 2)), (0, 2), 0),
    ):
        contract = decoder_contract("any", cache, tiny_models.VOCAB, "float32", layers=layers, taps_width=taps * 64)
        for values, specs in ((graph.graph.inputs, contract.inputs), (graph.graph.outputs, contract.outputs)):
            assert names(list(values)) == [spec.name for spec in specs]
            for value, spec in zip(values, specs, strict=True):
                assert value.shape is not None and value.dtype is not None
                assert value.dtype.name.lower() == {"float32": "float", "int64": "int64", "bool": "bool"}[spec.dtype]
                dims = tuple(dim.value if isinstance(dim, ir.SymbolicDim) else dim for dim in value.shape)
                assert dims == spec.shape


def test_operators_are_standard_and_the_cache_is_updated_at_the_edge(traced: tuple[str, DecoderTrace]) -> None:
    """A cache tensor is read by its TensorScatter only, and what that writes is a graph output."""
    graph = export_target(traced[1]).graph
    assert {node.domain for node in graph} == {""}
    assert graph.opset_imports[""] == 24
    counts = Counter(node.op_type for node in graph)
    assert counts["Attention"] == tiny_models.LAYERS
    assert counts["TensorScatter"] == 2 * tiny_models.LAYERS
    for value in graph.inputs:
        if value.name and value.name.startswith("past_key_values."):
            scatters = [user.node for user in value.uses() if user.node.op_type != "Shape"]
            assert [node.op_type for node in scatters] == ["TensorScatter"]
            assert scatters[0].outputs[0].is_graph_output()


def test_a_self_draft_has_the_weights_of_its_layers_only(traced: tuple[str, DecoderTrace]) -> None:
    target = export_target(traced[1]).graph.initializers
    draft = export_self_draft(traced[1], (1,)).graph.initializers
    weights = [name for name in draft if name.startswith("model.")]
    assert set(weights) < set(target)
    assert all(draft[name].const_value is target[name].const_value for name in weights)
    assert any(".layers.1." in name for name in weights)
    assert not any(".layers.0." in name or ".layers.2." in name for name in weights)


def test_nodes_keep_their_module_path_and_nothing_else(traced: tuple[str, DecoderTrace]) -> None:
    graph = export_target(traced[1]).graph
    assert all(set(node.metadata_props) <= {SCOPES_KEY} for node in graph)
    attention = [node for node in graph if node.op_type == "Attention"]
    for number, node in enumerate(attention):
        assert f"layers.{number}.self_attn" in node.metadata_props[SCOPES_KEY]


def test_a_trace_can_be_cut_again_and_again(traced: tuple[str, DecoderTrace]) -> None:
    first = ir.to_proto(export_target(traced[1]).graph).SerializeToString()
    export_self_draft(traced[1], (0,))
    assert ir.to_proto(export_target(traced[1]).graph).SerializeToString() == first


@pytest.mark.parametrize("taps", [(3,), (-2,), (0, 99)])
def test_taps_that_do_not_exist_are_refused(traced: tuple[str, DecoderTrace], taps: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="layers 0 to 2"):
        export_target(traced[1], taps=taps)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_caches_have_the_models_type_and_logits_are_float32(dtype: torch.dtype) -> None:
    _, model = tiny_models.make("llama", dtype=dtype)
    graph = export_target(model).graph
    wanted = {torch.float16: ir.DataType.FLOAT16, torch.bfloat16: ir.DataType.BFLOAT16}[dtype]
    assert graph.outputs[0].dtype == ir.DataType.FLOAT
    assert {value.dtype for value in graph.outputs[1:]} == {wanted}
    assert {value.dtype for value in graph.inputs[5:]} == {wanted}


@pytest.mark.parametrize(
    ("arch", "geometry"),
    [
        ("llama", {(2, 16, 16, None)}),
        ("mistral", {(2, 16, 16, 8)}),
        ("gemma2", {(2, 24, 24, 8), (2, 24, 24, None)}),
        ("deepseek_v3", {(1, 24, 8, None)}),
        ("gpt2", {(4, 16, 16, None)}),
    ],
)
def test_cache_geometry_is_what_the_model_really_keeps(
    arch: str, geometry: set[tuple[int, int, int, int | None]]
) -> None:
    found = probe(tiny_models.config(arch))
    assert len(found) == tiny_models.LAYERS
    assert {(layer.kv_heads, layer.key_dim, layer.value_dim, layer.window) for layer in found} == geometry


@pytest.mark.parametrize("arch", ["mixtral", "gemma3_text"])
@pytest.mark.parametrize("layers", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_a_self_draft_reads_nothing_of_the_layers_it_leaves_out(arch: str, layers: tuple[int, ...]) -> None:
    """ONNX Runtime opens it, so nothing hangs in the air; sizes are not read from another layer's cache."""
    graph = export_self_draft(shared_trace(arch), layers)
    proto = ir.to_proto(graph)
    onnx.checker.check_model(proto, full_check=True)
    for name in graph.graph.initializers:
        numbers = {int(n) for n in re.findall(r"\blayers\.(\d+)\.", name)}
        assert numbers <= set(layers)


@functools.cache
def shared_trace(arch: str) -> DecoderTrace:
    return DecoderTrace(tiny_models.make(arch)[1])


def test_an_expert_is_read_once_however_many_rows_chose_it() -> None:
    """The traced form of transformers would gather one copy of an expert's matrices for each row and choice."""
    graph = export_target(shared_trace("mixtral")).graph
    loops = [node for node in graph if node.op_type == "Loop"]
    assert len(loops) == 2 * tiny_models.LAYERS
    for name, value in graph.initializers.items():
        if ".experts." in name:
            readers = [user.node.op_type for user in value.uses()]
            assert readers == ["Gather"]
