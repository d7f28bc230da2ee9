"""Channels scaled to similar magnitudes before products: only what 8 bits of an activation can hold changes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_export import passes
from dspark_export.build.calibrate import Calibration, calibrate, shared_range, smoothing, stored_calibration
from dspark_export.bundle.weights import save_graphs
from dspark_export.passes.match import RANGES
from dspark_export.passes.precision import PrecisionSettings, apply_precision
from dspark_export.passes.smooth_norms import SmoothNorms, norms_of_products
from tests import tiny_models
from tests.parity.harness import GraphRunner, Tree

PROMPT = [int(t) for t in np.random.default_rng(0).integers(3, tiny_models.VOCAB, 24)]
ATTENTION, FEED_FORWARD = "model.layers.{}.input_layernorm.weight", "model.layers.{}.post_attention_layernorm.weight"
WEIGHTS = ("self_attn.qkv_proj", "mlp.gate_up_proj")
OF_LLAMA = {name.format(n) for n in range(tiny_models.LAYERS) for name in (ATTENTION, FEED_FORWARD)}


def optimized(traced: Callable, arch: str) -> ir.Model:
    return passes.optimize(traced(arch)[1].clone())


def logits(graphs: dict[str, ir.Model], folder: Path) -> dict[str, np.ndarray]:
    return {
        name: GraphRunner(path, batch=1).step([Tree.chain(PROMPT)])[0]
        for name, path in save_graphs(graphs, folder).items()
    }


@pytest.mark.parametrize(
    ("arch", "norms"),
    [
        ("llama", OF_LLAMA),  # not the last norm, whose rows are chosen before the head reads them
        (
            "qwen3_moe",
            {*map(ATTENTION.format, range(tiny_models.LAYERS)), FEED_FORWARD.format(1)},
        ),  # no norm of a router
        ("gpt2", set()),  # its norms subtract the mean
    ],
)
def test_norms_that_only_products_read(arch: str, norms: set[str], traced: Callable) -> None:
    assert set(norms_of_products(optimized(traced, arch))) == norms


@pytest.mark.parametrize("arch", ["llama", "qwen3", "deepseek_v2"])
def test_the_function_stays_the_same_to_the_last_bit(arch: str, traced: Callable, tmp_path: Path) -> None:
    plain, random = optimized(traced, arch), np.random.default_rng(3)
    channels = {gain: plain.graph.initializers[gain].shape[0] for gain in norms_of_products(plain)}
    exponents = {gain: random.integers(-6, 7, size).astype(np.int8) for gain, size in channels.items()}
    smooth = optimized(traced, arch)
    assert exponents and SmoothNorms(exponents)(smooth).modified
    gain = next(iter(exponents))
    before, after = (graph.graph.initializers[gain].const_value.numpy() for graph in (plain, smooth))
    assert (before == after * np.exp2(exponents[gain].astype(np.float32))).all() and (before != after).any()
    found = logits({"plain": plain, "smooth": smooth}, tmp_path)
    np.testing.assert_array_equal(found["plain"], found["smooth"])


@settings(max_examples=100, deadline=None)
@given(count=st.integers(1, 40), seed=st.integers(0, 2**32 - 1), spread=st.floats(0, 12))
def test_exponents_follow_the_size_of_channels(count: int, seed: int, spread: float) -> None:
    random = np.random.default_rng(seed)
    activations, weights = np.exp2(spread * random.standard_normal((2, count)))
    activations[random.random(count) < 0.2] = 0
    found = smoothing(activations, weights)
    assert found.dtype == np.int8 and found.shape == (count,) and np.abs(found).max() <= 12
    assert (found[activations == 0] == 0).all()
    known = activations > 0
    if known.any() and np.abs(found).max() < 12:
        assert abs(found[known].astype(float).mean()) <= 0.5  # on the whole, neither side gets larger
    alike = smoothing(activations, np.ones(count))
    order = np.argsort(activations[known])
    assert (np.diff(alike[known][order].astype(int)) >= 0).all()


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(100, 300), width=st.integers(8, 64), seed=st.integers(0, 2**32 - 1), spread=st.floats(0, 3))
def test_one_scale_where_it_costs_little(rows: int, width: int, seed: int, spread: float) -> None:
    """A range is given where rounding with it is about as good as promised, and only there."""
    random = np.random.default_rng(seed)
    x = random.standard_normal((rows, width)) * np.exp(spread * random.standard_normal((rows, 1)))
    largest, squares = np.abs(x).max(1), np.square(x).mean(1)
    size = shared_range(largest, squares)
    step = largest.max() / 127
    error = np.square(np.rint(x / step) * step - x).mean(1) / squares
    if size is None:
        assert error.mean() > 0.001
    else:
        assert size == largest.max() and error.mean() < 0.006


def test_no_scale_for_rows_that_are_nothing_or_not_finite() -> None:
    assert shared_range(np.zeros(9), np.zeros(9)) is None
    assert shared_range(np.full(9, np.inf), np.full(9, np.inf)) is None
    assert shared_range(np.array([1.0, np.nan]), np.array([1.0, np.nan])) is None


def test_fewer_operators_and_nearly_the_same_logits(traced: Callable, tmp_path: Path) -> None:
    model, _ = traced("llama")
    calibration = calibrate(model, tiny_models.tokenizer().backend_tokenizer, optimized(traced, "llama"))
    assert set(calibration.exponents) == OF_LLAMA
    shared = {name for name in calibration.ranges if "down_proj" not in name and "o_proj" not in name}
    assert shared == {f"model.layers.{n}.{name}.weight" for n in range(tiny_models.LAYERS) for name in WEIGHTS}
    graphs = {}
    for name, chosen in (("by row", Calibration({}, {})), ("calibrated", calibration)):
        standard = optimized(traced, "llama")
        chosen.apply({"target": standard})
        apply_precision(standard, PrecisionSettings("w8a8"))
        graphs |= {f"{name} standard": standard, name: passes.for_ort_cpu(standard, tiny_models.MAX_POSITIONS)}
    kinds = {name: Counter(node.op_type for node in graph.graph) for name, graph in graphs.items()}
    others = len(calibration.ranges) - len(shared)
    for kind in ("Abs", "ReduceMax", "Div"):
        assert kinds["by row"][kind] - kinds["calibrated"][kind] == 2 * tiny_models.LAYERS + others
    assert kinds["by row"]["Mul"] - kinds["calibrated"]["Mul"] == 2 * tiny_models.LAYERS + others
    assert kinds["by row"]["QuantizeLinear"] == kinds["calibrated"]["QuantizeLinear"]
    found = logits(graphs, tmp_path)
    size = float(np.sqrt(np.mean(found["calibrated standard"] ** 2)))
    assert 0 < np.sqrt(np.mean((found["calibrated"] - found["calibrated standard"]) ** 2)) < 0.1 * size


def test_rows_do_not_depend_on_each_other(traced: Callable, tmp_path: Path) -> None:
    model, _ = traced("llama")
    standard = optimized(traced, "llama")
    calibrate(model, tiny_models.tokenizer().backend_tokenizer, standard).apply({"target": standard})
    apply_precision(standard, PrecisionSettings("w8a8"))
    path = save_graphs({"cpu": passes.for_ort_cpu(standard, tiny_models.MAX_POSITIONS)}, tmp_path)["cpu"]
    whole = GraphRunner(path, batch=1).step([Tree.chain(PROMPT)])[0]
    first = GraphRunner(path, batch=1).step([Tree.chain(PROMPT[:9])])[0]
    np.testing.assert_array_equal(first, whole[:9])


def test_a_stored_calibration_is_found_again(traced: Callable, tmp_path: Path) -> None:
    model, _ = traced("qwen3")
    calibration = calibrate(model, tiny_models.tokenizer().backend_tokenizer, optimized(traced, "qwen3"))
    standard = optimized(traced, "qwen3")
    calibration.apply({"target": standard})
    apply_precision(standard, PrecisionSettings("w8a8"))
    stored = ir.load(save_graphs({"target": standard}, tmp_path)["target"])
    found = stored_calibration(stored, optimized(traced, "qwen3"))
    assert found is not None and found.ranges == calibration.ranges
    assert set(found.exponents) == set(calibration.exponents)
    for gain, exponents in calibration.exponents.items():
        np.testing.assert_array_equal(found.exponents[gain], exponents)
    assert RANGES in stored.metadata_props
    assert stored_calibration(optimized(traced, "qwen3"), optimized(traced, "qwen3")) is None


@pytest.mark.parametrize("factor", [1.25, 2.0])
def test_a_damaged_gain_is_no_calibration(factor: float, traced: Callable) -> None:
    """Either the gain differs from what its own exponent gives, or the weights do not belong to the exponent."""
    model, _ = traced("llama")
    stored = optimized(traced, "llama")
    calibrate(model, tiny_models.tokenizer().backend_tokenizer, stored).apply({"target": stored})
    gain, weight = ATTENTION.format(1), "model.layers.1.self_attn.qkv_proj.weight"
    value = stored.graph.initializers[gain]
    damaged = value.const_value.numpy().copy()
    damaged[7] *= factor
    value.const_value = ir.tensor(damaged, name=gain)
    fresh = optimized(traced, "llama")
    found = stored_calibration(stored, fresh)
    assert found is not None
    found.apply({"target": fresh})
    pairs = [
        [graph.graph.initializers[name].const_value.numpy() for graph in (stored, fresh)] for name in (gain, weight)
    ]
    same = [np.array_equal(*pair) for pair in pairs]
    assert same == ([False, True] if factor == 1.25 else [True, False])


def test_a_self_draft_is_smoothed_and_keeps_its_own_scales(traced: Callable) -> None:
    """It shares the weights, but not the size of activations: layers in between are left out."""
    model, _ = traced("llama")
    graphs = {name: optimized(traced, "llama") for name in ("target", "self_draft")}
    calibrate(model, tiny_models.tokenizer().backend_tokenizer, graphs["target"]).apply(graphs)
    gains = [graph.graph.initializers[ATTENTION.format(1)].const_value.numpy() for graph in graphs.values()]
    np.testing.assert_array_equal(*gains)
    assert graphs["self_draft"].metadata_props[RANGES] == "{}" != graphs["target"].metadata_props[RANGES]
