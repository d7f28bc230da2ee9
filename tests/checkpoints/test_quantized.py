"""Quantized checkpoints become the floats their integers stand for: layouts written here by hand, value by value."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from dspark_export.checkpoints import resolve
from dspark_export.checkpoints.quantized.layouts import mxfp4_experts
from dspark_export.checkpoints.quantized.methods import check_method
from dspark_runtime.errors import InvalidWeights, UnsupportedArchitecture
from tests import tiny_models
from tests.checkpoints.checkpoint_samples import edit_config, write_checkpoint
from tests.checkpoints.quantized_samples import CASES, FILE, Tensors, compressed, quantize


@pytest.mark.parametrize("case", CASES)
def test_weights_are_what_the_integers_stand_for(case: str, tmp_path: Path) -> None:
    settings, writer = CASES[case]
    folder = write_checkpoint(tmp_path / "model")
    plain = load_file(folder / FILE)
    meant = quantize(folder, settings, writer)
    found = resolve(str(folder))
    assert settings["quant_method"] in found.unread["quantization_config"]
    loaded = found.load_model(torch.float32).state_dict()
    assert len(meant) == 7
    for name, weight in meant.items():
        np.testing.assert_allclose(loaded[name].numpy(), weight, rtol=2e-7, err_msg=name)
    for name in plain.keys() - meant.keys():
        assert torch.equal(loaded[name], plain[name])


def test_scales_of_activations_stay_unread(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model")
    quantize(folder, *CASES["fp8, a scale for the tensor"])
    stored = load_file(folder / FILE) | {"model.layers.0.mlp.up_proj.activation_scale": torch.tensor(0.5)}
    save_file(stored, folder / FILE, {"format": "pt"})
    assert "activations" in resolve(str(folder)).unread["model.layers.*.mlp.up_proj.activation_scale"]


def test_the_biases_of_zeros_that_autogptq_stores_are_harmless(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model")
    quantize(folder, *CASES["gptq 4 bits"])
    stored = load_file(folder / FILE)
    biases = {f"model.layers.{layer}.mlp.up_proj.bias": torch.zeros(64, dtype=torch.float16) for layer in (0, 1)}
    save_file(stored | biases, folder / FILE, {"format": "pt"})
    assert "zeros" in resolve(str(folder)).unread["model.layers.*.mlp.up_proj.bias"]
    biases["model.layers.1.mlp.up_proj.bias"][3] = 1e-3
    save_file(stored | biases, folder / FILE, {"format": "pt"})
    with pytest.raises(InvalidWeights, match=r"layers\.1\.mlp\.up_proj\.bias"):
        resolve(str(folder))


@pytest.mark.parametrize(
    ("case", "file", "own"),
    [
        (
            "modelopt fp8",
            "hf_quant_config.json",
            {"quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}},
        ),
        ("gptq 4 bits", "quantize_config.json", {"bits": 4, "group_size": 16, "desc_act": False, "sym": False}),
        ("awq", "quant_config.json", {"zero_point": True, "q_group_size": 16, "w_bit": 4, "version": "GEMM"}),
    ],
)
def test_tools_may_say_it_in_a_file_of_their_own(case: str, file: str, own: dict[str, Any], tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model")
    settings, writer = CASES[case]
    quantize(folder, settings, writer)
    edit_config(folder, quantization_config=...)
    (folder / file).write_text(json.dumps(own))
    assert settings["quant_method"] in resolve(str(folder)).unread["quantization_config"]


def test_mxfp4_experts_equal_transformers() -> None:
    blocks = torch.randint(0, 256, (3, 8, 2, 16), dtype=torch.uint8)
    scales = torch.randint(110, 135, (3, 8, 2), dtype=torch.uint8)
    theirs = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    assert torch.equal(mxfp4_experts({"blocks": blocks, "scales": scales}), theirs)


def test_gpt_oss_reads_the_experts_it_is_published_with(tmp_path: Path) -> None:
    folder = tiny_models.save_checkpoint("gpt_oss", tmp_path / "model")
    stored = load_file(folder / FILE)
    meant = {}
    for name in [name for name in stored if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, out = stored.pop(name).shape
        blocks = torch.randint(0, 256, (experts, out, inputs // 32, 16), dtype=torch.uint8)
        scales = torch.randint(118, 126, (experts, out, inputs // 32), dtype=torch.uint8)
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        meant[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    save_file(stored, folder / FILE, {"format": "pt"})
    settings = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.mlp.router", "lm_head"]}
    edit_config(folder, quantization_config=settings)
    loaded = resolve(str(folder)).load_model(torch.float32).state_dict()
    assert len(meant) == 4 and all(torch.equal(loaded[name], weight) for name, weight in meant.items())


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "aqlm"}, "aqlm"),
        ({"load_in_4bit": True}, "unnamed"),
        ({"quant_method": "awq", "version": "gemv"}, "gemv"),
        ({"quant_method": "awq", "bits": 8}, "8 bits"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "marlin"),
        ({"quant_method": "gptq", "bits": 5}, "5 bits"),
        ({"quant_method": "fp8", "weight_block_size": 128}, "weight_block_size"),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "W4A8_AWQ"),
        (compressed("marlin-24"), "marlin-24"),
        (compressed("pack-quantized", num_bits=3, type="int"), "3 bits"),
        ({**compressed("int-quantized"), "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24"),
        ({**compressed("int-quantized"), "transform_config": {"config_groups": {"R1": {}}}}, "rotations"),
    ],
)
def test_other_methods_and_variants_are_refused_by_name(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UnsupportedArchitecture, match=says):
        check_method(settings, "it")


def drop(ending: str) -> Callable[[Tensors], Tensors]:
    return lambda stored: {name: tensor for name, tensor in stored.items() if not name.endswith(ending)}


def replace(ending: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], Tensors]:
    return lambda stored: {
        name: change(tensor).contiguous() if name.endswith(ending) else tensor for name, tensor in stored.items()
    }


@pytest.mark.parametrize(
    ("case", "damage", "says"),
    [
        ("gptq 4 bits", drop("up_proj.qzeros"), "lacks .*qzeros"),
        ("gptq 4 bits", replace("up_proj.scales", lambda scales: scales[:, :-8]), "scales"),
        ("gptq 4 bits", replace("up_proj.g_idx", lambda index: index[:-1]), "g_idx"),
        ("gptq 4 bits", drop("_proj.qweight"), "none of that layout"),
        ("awq", replace("up_proj.qzeros", lambda zeros: zeros[:, :-1]), "qzeros"),
        ("fp8, blocks that are cut off", drop("up_proj.weight_scale_inv"), "F8_E4M3"),
        ("fp8, blocks that are cut off", replace("up_proj.weight_scale_inv", lambda scales: scales[:-1]), "scale_inv"),
        ("compressed-tensors, int-quantized", replace("up_proj.weight", lambda codes: codes.float()), "not compressed"),
        ("compressed-tensors, pack-quantized", drop("up_proj.weight_shape"), "weight_shape"),
        ("compressed-tensors, nvfp4", drop("up_proj.weight_scale"), "weight_scale"),
    ],
)
def test_parts_that_do_not_fit_together(
    case: str, damage: Callable[[Tensors], Tensors], says: str, tmp_path: Path
) -> None:
    folder = write_checkpoint(tmp_path / "model")
    quantize(folder, *CASES[case])
    save_file(damage(load_file(folder / FILE)), folder / FILE, {"format": "pt"})
    with pytest.raises(InvalidWeights, match=says):
        resolve(str(folder))
