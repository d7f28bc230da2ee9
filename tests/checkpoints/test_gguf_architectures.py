"""Every architecture and every setting that changes numbers: a GGUF file gives the logits of the model it was written
from, and llama.cpp's. What cannot be honoured is refused by name."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dspark_export.checkpoints import resolve
from dspark_export.validate.llama_cpp import difference, installed, llama_cpp_logits
from dspark_runtime.errors import CheckpointError, InvalidWeights, UnsupportedArchitecture
from tests.checkpoints.gguf_models import CASES, Case, fields_of, last_logits, original, tensors_of, texts, write_case
from tests.checkpoints.gguf_samples import write_gguf

QUICK = ("llama 3.1", "qwen2, yarn", "gemma3 4B", "mixtral", "llama, biases")
CLOSE_TO_LLAMA_CPP = 2e-3
"""Of the range of the logits: llama.cpp looks gelu up in a table of half-precision numbers."""
needs_llama_cpp = pytest.mark.skipif(not installed(), reason="no wheel of llama.cpp (pip install xllamacpp)")


@pytest.mark.parametrize("name", CASES)
def test_the_model_is_the_one_the_file_was_written_from(name: str, tmp_path: Path) -> None:
    model = write_case(CASES[name], tmp_path / "model.gguf")
    loaded = _load(tmp_path / "model.gguf")
    for text in texts(200):
        want, got = last_logits(model, text), last_logits(loaded, text)
        assert np.abs(want - got).max() <= 2e-6 * np.abs(want).max()


@needs_llama_cpp
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CASES]
)
def test_llama_cpp_agrees(name: str, tmp_path: Path) -> None:
    if CASES[name].llama_cpp:
        pytest.skip(CASES[name].llama_cpp)
    path = tmp_path / "model.gguf"
    write_case(CASES[name], path)
    loaded = _load(path)
    for text, theirs in zip(texts(200), llama_cpp_logits(path, texts(200), 256), strict=True):
        ours = last_logits(loaded, text)
        assert difference(ours, theirs) <= CLOSE_TO_LLAMA_CPP * np.ptp(ours)


def _load(path: Path) -> torch.nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return resolve(str(path)).load_model(torch.float32)


LLAMA = CASES["llama"]
REFUSED: dict[str, Case] = {
    "attention.sliding_window_pattern": replace(LLAMA, keys={"attention.sliding_window_pattern": 2}),
    "rope.dimension_count": replace(LLAMA, keys={"rope.dimension_count": 8}),
    "rope.dimension_sections": replace(LLAMA, keys={"rope.dimension_sections": [2, 3, 3, 0]}),
    "rope.scaling.type": replace(LLAMA, keys={"rope.scaling.type": "exotic"}),
    "rope.freq_base_swa": replace(LLAMA, keys={"rope.freq_base_swa": 500.0}),
    "rope.scaling.yarn_attn_factor": replace(CASES["qwen2, yarn"], keys={"rope.scaling.yarn_attn_factor": 1.5}),
    "logit_scale": replace(LLAMA, keys={"logit_scale": 0.5}),
    "attn_logit_softcapping": replace(LLAMA, keys={"attn_logit_softcapping": 50.0}),
    "final_logit_softcapping": replace(LLAMA, keys={"final_logit_softcapping": 30.0}),
    "attention.scale": replace(LLAMA, keys={"attention.scale": 0.3}),
    "attention.value_length": replace(LLAMA, keys={"attention.key_length": 16, "attention.value_length": 8}),
    "expert_weights_scale": replace(CASES["qwen3moe"], keys={**CASES["qwen3moe"].keys, "expert_weights_scale": 2.5}),
    "expert_gating_func": replace(CASES["mixtral"], keys={**CASES["mixtral"].keys, "expert_gating_func": 2}),
    "expert_group_count": replace(CASES["qwen3moe"], keys={**CASES["qwen3moe"].keys, "expert_group_count": 2}),
    "attention.temperature_scale": replace(LLAMA, keys={"attention.temperature_scale": 0.1}),
    "some.setting.of.tomorrow": replace(LLAMA, keys={"some.setting.of.tomorrow": 3}),
}


@pytest.mark.parametrize("key", REFUSED)
def test_a_setting_that_cannot_be_honoured_is_refused(key: str, tmp_path: Path) -> None:
    write_case(REFUSED[key], tmp_path / "model.gguf")
    with pytest.raises(CheckpointError, match=key):
        resolve(str(tmp_path / "model.gguf"))


@pytest.mark.parametrize(
    "tensor",
    ["blk.0.attn_q_norm.weight", "blk.1.attn_q.scale", "blk.0.post_ffw_norm.weight", "per_layer_proj_norm.weight"],
)
def test_a_tensor_the_model_does_not_take_is_refused(tensor: str, tmp_path: Path) -> None:
    case = replace(LLAMA, edit=lambda tensors: tensors.update({tensor: np.ones(16, np.float32)}))
    write_case(case, tmp_path / "model.gguf")
    with pytest.raises(InvalidWeights, match=tensor.split(".")[-2]):
        resolve(str(tmp_path / "model.gguf"))


def test_half_of_the_biases_is_a_damaged_file(tmp_path: Path) -> None:
    biased = CASES["llama, biases"]
    write_case(replace(biased, edit=lambda tensors: tensors.pop("blk.1.attn_q.bias")), tmp_path / "model.gguf")
    with pytest.raises(InvalidWeights, match=r"q_proj\.bias"):
        resolve(str(tmp_path / "model.gguf"))


def test_what_stays_unread_is_recorded_with_its_reason(tmp_path: Path) -> None:
    keys = {"rope.scaling.finetuned": False, "vision.block_count": 27, "expert_count": 0}
    extra = {"v.blk.0.attn_q.weight": np.ones((4, 4), np.float32), "mm.input_projection.weight": np.ones(4, np.float32)}
    case = replace(LLAMA, keys=keys, edit=lambda tensors: tensors.update(extra))
    write_case(case, tmp_path / "model.gguf")
    checkpoint = resolve(str(tmp_path / "model.gguf"))
    assert set(checkpoint.unread) == {
        "llama.rope.scaling.finetuned",
        "llama.vision.block_count",
        "v.blk.*.attn_q.weight",
        "mm.input_projection.weight",
    }
    assert checkpoint.source().unread == checkpoint.unread


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    model = original(LLAMA)
    fields = {"general.type": "adapter", **fields_of(model, LLAMA)}
    write_gguf(tmp_path / "lora.gguf", fields, tensors_of(model, "llama"))
    with pytest.raises(UnsupportedArchitecture, match="adapter"):
        resolve(str(tmp_path / "lora.gguf"))
