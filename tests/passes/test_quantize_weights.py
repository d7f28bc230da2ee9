"""Block quantization: the arithmetic, the graph around it, and that nothing large is silently left in float."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_export import passes
from dspark_export.bundle.weights import save_graphs
from dspark_export.passes.precision import PrecisionSettings, apply_precision
from dspark_export.passes.quantize_weights import BlockQuantization, QuantizeWeights, fitting_block, quantize_blocks
from dspark_runtime.errors import ExportError
from tests import tiny_models
from tests.parity.harness import FloatProducts, Literal, Tree, assert_close, plain_logits


def restored(parts: dict[str, np.ndarray], block: int) -> np.ndarray:
    quantized = parts["weight_q"].astype(np.float32)
    grouped = quantized.reshape(-1, block, quantized.shape[1])
    points = parts.get("weight_zero_point")
    shift = 0.0 if points is None else points.astype(np.float32)[:, None]
    return ((grouped - shift) * parts["weight_scale"][:, None]).reshape(quantized.shape)


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from([4, 8]),
    symmetric=st.booleans(),
    block=st.sampled_from([16, 32, 64]),
    groups=st.integers(1, 4),
    width=st.integers(1, 9),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_weight_is_within_half_a_step(
    bits: int, symmetric: bool, block: int, groups: int, width: int, seed: int
) -> None:
    weight = np.random.default_rng(seed).standard_normal((groups * block, width)).astype(np.float32)
    parts = quantize_blocks(weight, BlockQuantization(bits, block, symmetric))
    step = np.repeat(np.abs(parts["weight_scale"]), block, axis=0)
    error = np.abs(restored(parts, block) - weight)
    # The 4-bit range has one step more on one side, so the far end of the other may be clipped by up to a step.
    assert (error <= step * (1.0 if bits == 4 else 0.5) + 1e-6).all()
    assert float((error > step * 0.5 + 1e-6).mean()) <= 2 / block


def test_a_block_of_zeros_stays_zero() -> None:
    for bits in (4, 8):
        parts = quantize_blocks(np.zeros((32, 2), np.float32), BlockQuantization(bits))
        assert not restored(parts, 32).any()


LAYERS = tiny_models.LAYERS


@pytest.fixture
def quantized(traced: Callable, tmp_path: Path) -> Callable[[str], Path]:
    def make(weights: str) -> Path:
        standard = passes.optimize(traced("llama")[1].clone())
        apply_precision(standard, PrecisionSettings(weights, block_size=32))
        variant = passes.for_ort_cpu(standard, tiny_models.MAX_POSITIONS)
        return save_graphs({"standard": standard, "variant": variant}, tmp_path)["variant"]

    return make


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_fused_kernels_compute_what_the_graph_says(weights: str, traced: Callable, quantized: Callable) -> None:
    path = quantized(weights)
    prompt = [int(t) for t in np.random.default_rng(0).integers(3, tiny_models.VOCAB, 24)]
    fused = FloatProducts(path, batch=1).step([Tree.chain(prompt)])[0]
    literal = Literal(path, batch=1).step([Tree.chain(prompt)])[0]
    assert_close(fused, literal)
    assert_close(Literal(path.with_name("standard.onnx"), batch=1).step([Tree.chain(prompt)])[0], literal)
    error = np.abs(literal - plain_logits(traced("llama")[0], prompt)).mean()
    assert 1e-4 < error < {"int8": 0.02, "int4": 0.3}[weights]


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_onnxruntime_runs_its_quantized_kernel(weights: str, quantized: Callable, tmp_path: Path) -> None:
    path = quantized(weights)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "loaded.onnx")
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    kernels = [n.op_type for n in ir.load(tmp_path / "loaded.onnx").graph]
    assert kernels.count("MatMulNBits") == LAYERS * 4 + 1 and "MatMul" not in kernels


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("embedding", [True, False])
def test_head_and_embedding_are_included_on_request(head: bool, embedding: bool, traced: Callable) -> None:
    graph = passes.optimize(traced("llama")[1].clone())
    rewrite = QuantizeWeights(BlockQuantization(8, head=head, embedding=embedding))
    rewrite(graph)
    assert ("lm_head.weight" in rewrite.quantized) == head
    assert ("model.embed_tokens.weight.rows" in rewrite.quantized) == embedding
    left = {
        n
        for n, v in graph.graph.initializers.items()
        if v.shape is not None and len(v.shape) == 2 and v.dtype == ir.DataType.FLOAT
    }
    assert ("lm_head.weight" in left) != head and ("model.embed_tokens.weight" in left) != embedding


def test_a_tied_head_is_quantized_from_the_embedding(traced: Callable) -> None:
    graph = passes.optimize(traced("qwen3")[1].clone())
    rewrite = QuantizeWeights(BlockQuantization(8))
    rewrite(graph)
    assert {"lm_head.weight.T", "lm_head.weight.rows"} <= set(rewrite.quantized)
    assert "lm_head.weight" not in graph.graph.initializers


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_used_several_times(bits: int, tmp_path: Path) -> None:
    """As in the unrolled loop of a Markov head: a table looked up and a matrix multiplied once per step."""
    rng = np.random.default_rng(0)
    table, matrix = rng.normal(size=(300, 64)).astype(np.float32), rng.normal(size=(64, 96)).astype(np.float32)
    nodes = [onnx.helper.make_node("Gather", ["table", "ids"], ["row0"], name="g0")]
    for step in range(2):
        nodes.append(onnx.helper.make_node("MatMul", [f"row{step}", "matrix"], [f"out{step}"], name=f"m{step}"))
        nodes.append(onnx.helper.make_node("Gather", ["table", "others"], [f"row{step + 1}"], name=f"g{step + 1}"))
    given = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT64, [3]) for name in ("ids", "others")]
    results = [onnx.helper.make_tensor_value_info(f"out{i}", onnx.TensorProto.FLOAT, [3, 96]) for i in range(2)]
    weights = [onnx.numpy_helper.from_array(array, name) for name, array in (("table", table), ("matrix", matrix))]
    proto = onnx.helper.make_graph(nodes, "loop", given, results, weights)
    opset = [onnx.helper.make_opsetid("", 24)]
    model = ir.from_proto(onnx.helper.make_model(proto, opset_imports=opset, ir_version=11))
    QuantizeWeights(BlockQuantization(bits, head=True))(model)
    names = [node.name for node in model.graph]
    assert len(set(names)) == len(names) and "DequantizeLinear" in {node.op_type for node in model.graph}
    session = ort.InferenceSession(save_graphs({"loop": model}, tmp_path)["loop"])
    ids, others = np.array([1, 2, 3]), np.array([7, 8, 299])
    found = session.run(None, {"ids": ids, "others": others})
    for result, rows in zip(found, (ids, others), strict=True):
        exact = table[rows] @ matrix
        assert 0 < np.abs(result - exact).max() < (0.02 if bits == 8 else 0.2) * np.abs(exact).max()


@given(st.integers(1, 4096), st.sampled_from([16, 32, 64, 128, 256]))
def test_blocks_divide_what_they_are_of(depth: int, most: int) -> None:
    block = fitting_block(depth, most)
    if depth % 16:
        assert block == 0
    else:
        assert block and depth % block == 0 and most % block == 0 and block >= 16
        assert block == most or depth % (2 * block)  # no larger one would do
    assert fitting_block(depth, None) is None


def test_a_matrix_has_the_largest_block_that_divides_its_inputs(traced: Callable) -> None:
    graph = passes.optimize(traced("llama")[1].clone())
    report = apply_precision(graph, PrecisionSettings("int8", block_size=64))
    assert not any("mlp" in name for name in report.left_in_float)
    sizes = {n.name: n.attributes["block_size"].as_int() for n in graph.graph if n.op_type == "DequantizeLinear"}
    assert {size for name, size in sizes.items() if "down_proj" in str(name)} == {32}  # of 96 inputs
    assert {size for name, size in sizes.items() if "gate" in str(name)} == {64}


def products(depth: int, width: int) -> ir.Model:
    """One product with a constant weight [depth, width]."""
    weight = onnx.numpy_helper.from_array(np.ones((depth, width), np.float32), "odd.weight")
    given_, found = (
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, size])
        for name, size in (("x", depth), ("y", width))
    )
    node = onnx.helper.make_node("MatMul", ["x", "odd.weight"], ["y"], name="m")
    proto = onnx.helper.make_graph([node], "g", [given_], [found], [weight])
    opset = [onnx.helper.make_opsetid("", 24)]
    return ir.from_proto(onnx.helper.make_model(proto, opset_imports=opset, ir_version=11))


def test_weights_that_cannot_be_quantized_are_named(traced: Callable) -> None:
    graph = passes.optimize(traced("llama")[1].clone())
    odd = products(200, 100)  # 200 is not a multiple of 16
    for node in list(odd.graph):
        odd.graph.remove(node)
        graph.graph.append(node)
    weight = odd.graph.initializers.pop("odd.weight")
    graph.graph.initializers["odd.weight"] = weight
    report = apply_precision(graph, PrecisionSettings("int8", block_size=32))
    assert report.quantized and report.left_in_float == ("odd.weight",)


def test_nothing_quantized_is_an_error() -> None:
    with pytest.raises(ExportError, match="multiple of 16"):
        apply_precision(products(200, 100), PrecisionSettings("int8", block_size=32))
