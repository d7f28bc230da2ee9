"""Faults in a built bundle: each is caught, and named by the check it belongs to."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from dspark_export.validate.checks import Check, Report
from tests.validate.conftest import Healthy, Validated
from tests.validate.faults import copied, edit, scale_weight


def failure(report: Report, name: str) -> Check:
    """The failed check ``name``."""
    found = {check.id: check for check in report.failures()}
    assert name in found, f"failed: {sorted(found)}"
    assert not report.passed
    return found[name]


def test_the_healthy_bundle_passes(healthy: Healthy, validated: Validated) -> None:
    report = validated(healthy.bundle)
    assert report.passed, [(c.id, c.where, c.message) for c in report.failures()]
    assert not [check.id for check in report.checks if check.status == "skipped"]
    assert {check.family for check in report.checks} == {
        "numerics",
        "losslessness",
        "plumbing",
        "robustness",
        "speed",
    }
    ids = {check.id for check in report.checks}
    assert {"numerics.dspark", "plumbing.reference.dspark", "plumbing.confidences.dspark", "plumbing.store"} <= ids


def test_one_weight_perturbed(damaged: Path, validated: Validated) -> None:
    name = "model.layers.3.mlp.down_proj.weight"

    def change(weights: np.ndarray) -> np.ndarray:
        weights[7] += 0.5
        return weights

    scale_weight(damaged, "target", name, change)
    report = validated(damaged)
    assert failure(report, "numerics.weights").where == name
    wrong = failure(report, "numerics.target.onnxruntime-cpu")
    assert "layers.3.mlp" in wrong.where and "polygraphy run" in wrong.message


def test_a_rotary_base_off_by_a_factor(damaged: Path, validated: Validated) -> None:
    def change(graph: onnx.GraphProto) -> int:
        for tensor in graph.initializer:
            if tensor.name.endswith("inv_freq"):
                values = numpy_helper.to_array(tensor, base_dir=str(damaged / "onnx")).copy()
                share = np.arange(len(values)) / len(values)
                tensor.CopyFrom(numpy_helper.from_array(values * 10.0 ** (-share).astype(np.float32), tensor.name))
                return 1
        return 0

    edit(damaged, "target", change)
    found = failure(validated(damaged), "numerics.target.standard")
    assert "rotary" in found.where


def test_a_tap_taken_after_the_norm(damaged: Path, validated: Validated) -> None:
    def change(graph: onnx.GraphProto) -> int:
        joined = next(node for node in graph.node if node.output[0] == "hidden_taps")
        for node in graph.node:
            if node.op_type == "RMSNormalization" and node.input[0] == joined.input[0]:
                joined.input[0] = node.output[0]
                return 1
        return 0

    edit(damaged, "target", change)
    found = failure(validated(damaged), "numerics.target.standard")
    assert "hidden_taps" in found.where or "hidden_taps" in found.message


def test_a_markov_head_fed_the_wrong_previous_token(damaged: Path, validated: Validated) -> None:
    def change(graph: onnx.GraphProto) -> int:
        looked_up = [n for n in graph.node if n.op_type == "Gather" and n.input[0].startswith("markov_head.markov_w1")]
        looked_up[2].input[1] = looked_up[1].input[1]
        return 1

    edit(damaged, "dspark", change)
    found = failure(validated(damaged), "numerics.dspark")
    assert found.where.startswith("corrected_logits") and "Markov" in found.where


def test_a_slot_written_one_off(damaged: Path, validated: Validated) -> None:
    def change(graph: onnx.GraphProto) -> int:
        writes = [n for n in graph.node if n.op_type == "TensorScatter"]
        if not writes:
            return 0
        one = numpy_helper.from_array(np.array([1], np.int64), "one_off")
        graph.initializer.append(one)
        shifted = onnx.helper.make_node("Add", ["write_indices", "one_off"], ["shifted"], name="one_off/Add")
        graph.node.insert(0, shifted)
        writes[0].input[2] = "shifted"
        return 1

    edit(damaged, "target", change)
    found = failure(validated(damaged), "numerics.target.standard")
    assert "layers.0" in found.where or "TensorScatter" in found.where


def test_a_quantized_layer_saturated(healthy: Healthy, validated: Validated, tmp_path: Path) -> None:
    bundle = copied(healthy.int8, tmp_path / "int8.damaged")
    name = "model.layers.2.mlp.gate_up_proj.weight.weight_q"
    scale_weight(bundle, "target", name, lambda weights: np.clip(weights.astype(np.int16) * 4, -127, 127))
    assert failure(validated(bundle), "numerics.weights").where == name
