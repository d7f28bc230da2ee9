"""Products of 8-bit weights and 8-bit activations: the arithmetic, whose sums are exact, and the graph around it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dspark_export import passes
from dspark_export.bundle.weights import save_graphs
from dspark_export.passes.ort_cpu_integer_products import OrtCpuIntegerProducts
from dspark_export.passes.precision import PrecisionSettings, apply_precision
from dspark_export.passes.quantize_weights import BlockQuantization, QuantizeWeights, quantize_blocks
from tests import tiny_models
from tests.parity.harness import FloatProducts, GraphRunner, Literal, Tree, assert_close, plain_logits

COLUMNS = BlockQuantization(8, None)


def product(weight: np.ndarray) -> ir.Model:
    """``x @ weight``, before any pass."""
    rows, columns = weight.shape
    given_, found = (
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["rows", size])
        for name, size in (("x", rows), ("y", columns))
    )
    node = onnx.helper.make_node("MatMul", ["x", "weight"], ["y"], name="product")
    graph = onnx.helper.make_graph([node], "one", [given_], [found], [onnx.numpy_helper.from_array(weight, "weight")])
    return ir.from_proto(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 24)], ir_version=11))


def session(model: ir.Model) -> ort.InferenceSession:
    return ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])


def of_integers(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The product as documented, sums in 64 bits."""
    parts = quantize_blocks(weight, COLUMNS)
    largest = np.abs(x).max(1, keepdims=True)
    rounded = np.rint(127 * np.divide(x, largest, out=np.zeros_like(x), where=largest > 0)).astype(np.int64)
    return rounded @ parts["weight_q"].astype(np.int64) * parts["weight_scale"].astype(np.float64) / 127 * largest


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 9),
    depth=st.integers(64, 200),
    width=st.integers(64, 90),
    size=st.sampled_from([1e-20, 1e-3, 1.0, 1e6]),
    seed=st.integers(0, 2**32 - 1),
)
@example(rows=2, depth=64, width=64, size=0.0, seed=0)
def test_the_product_is_that_of_integers(rows: int, depth: int, width: int, size: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    weight = random.standard_normal((depth, width)).astype(np.float32)
    x = (size * random.standard_normal((rows, depth)) ** 3).astype(np.float32)  # few numbers are large
    x[0] *= random.integers(0, 2)
    model = product(weight)
    QuantizeWeights(COLUMNS)(model)
    OrtCpuIntegerProducts()(model)
    assert "MatMul" not in {node.op_type for node in model.graph}
    run = session(model)
    found = run.run(None, {"x": x})[0]
    wanted = of_integers(x, weight)
    # A number half-way between two steps may be rounded either way by a division that is one bit off.
    step = np.abs(x).max(1, keepdims=True) / 127 * np.abs(weight).max()
    assert (np.abs(found - wanted) <= 1e-5 * np.abs(wanted) + 1.01 * step).all()
    assert (np.abs(found - wanted) > 1e-5 * np.abs(wanted) + 1e-5 * step).mean() < 0.05
    for row in range(rows):
        np.testing.assert_array_equal(run.run(None, {"x": x[row : row + 1]})[0][0], found[row])


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_no_sum_overflows(sign: float) -> None:
    """On processors without VNNI, pairs of products are added in 16 bits: the largest must fit."""
    weight = np.full((512, 128), 0.25, np.float32)
    x = np.full((3, 512), sign, np.float32)
    model = product(weight)
    QuantizeWeights(COLUMNS)(model)
    OrtCpuIntegerProducts()(model)
    np.testing.assert_allclose(session(model).run(None, {"x": x})[0], x @ weight, rtol=1e-5)


@settings(max_examples=30, deadline=None)
@given(depth=st.integers(1, 40), width=st.integers(1, 9), seed=st.integers(0, 2**32 - 1))
def test_every_weight_is_within_half_a_step_of_its_output(depth: int, width: int, seed: int) -> None:
    weight = np.random.default_rng(seed).standard_normal((depth, width)).astype(np.float32)
    weight[:, 0] = 0
    parts = quantize_blocks(weight, COLUMNS)
    assert parts["weight_scale"].shape == (width,) and np.abs(parts["weight_q"]).max(initial=0) <= 63
    error = np.abs(parts["weight_q"] * parts["weight_scale"] - weight)
    assert (error <= 0.501 * parts["weight_scale"]).all() and not parts["weight_q"][:, 0].any()


@pytest.fixture
def w8a8(traced: Callable, tmp_path: Path) -> Callable[[str], dict[str, Path]]:
    def make(arch: str) -> dict[str, Path]:
        standard = passes.optimize(traced(arch)[1].clone())
        apply_precision(standard, PrecisionSettings("w8a8"))
        return save_graphs(
            {"standard": standard, **passes.ort_cpu_variants(standard, tiny_models.MAX_POSITIONS)}, tmp_path
        )

    return make


@pytest.mark.parametrize("arch", ["llama", "gemma2", "gpt2", "qwen3"])
def test_forms_of_a_model(arch: str, traced: Callable, w8a8: Callable) -> None:
    paths = w8a8(arch)
    assert set(paths) == {"standard", "onnxruntime-cpu", "onnxruntime-cpu-batch"}
    prompt = [int(t) for t in np.random.default_rng(0).integers(3, tiny_models.VOCAB, 24)]
    logits = {name: GraphRunner(path, batch=1).step([Tree.chain(prompt)])[0] for name, path in paths.items()}
    plain = plain_logits(traced(arch)[0], prompt)
    size = float(np.sqrt(np.mean(plain**2)))
    for name in ("onnxruntime-cpu", "onnxruntime-cpu-batch"):
        assert 0 < np.sqrt(np.mean((logits[name] - logits["standard"]) ** 2)) < 0.1 * size
    assert np.sqrt(np.mean((logits["standard"] - plain) ** 2)) < 0.1 * size


def test_what_several_products_read_is_rounded_once(w8a8: Callable) -> None:
    graph = ir.load(w8a8("llama")["onnxruntime-cpu"]).graph
    kinds = Counter(node.op_type for node in graph)
    assert kinds["MatMulIntegerToFloat"] == tiny_models.LAYERS * 4 + 1 and kinds["MatMul"] == 0
    assert kinds["QuantizeLinear"] == tiny_models.LAYERS * 4 + 1
    assert kinds["DequantizeLinear"] == 1  # of the embedding's rows


def test_the_standard_form_is_standard(w8a8: Callable) -> None:
    paths = w8a8("llama")
    assert {node.domain for node in ir.load(paths["standard"]).graph} == {""}
    prompt = [int(t) for t in np.random.default_rng(0).integers(3, tiny_models.VOCAB, 24)]
    literal = Literal(paths["standard"], batch=1).step([Tree.chain(prompt)])[0]
    assert_close(FloatProducts(paths["standard"], batch=1).step([Tree.chain(prompt)])[0], literal)
