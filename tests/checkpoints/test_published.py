"""Configs and weights as they are published and as transformers writes them: no false refusal, no weight lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dspark_export.checkpoints import Trust, resolve
from dspark_export.checkpoints.architectures import TESTED, check_supported
from dspark_export.checkpoints.config import load_config, positions_of
from dspark_export.checkpoints.tokenizer import MissingTokenizer
from dspark_runtime.errors import DsparkError, InvalidConfig, InvalidTokenizer
from tests import tiny_models
from tests.checkpoints.checkpoint_samples import edit_config


@pytest.mark.parametrize("arch", sorted(TESTED))
def test_what_transformers_saves_is_taken_whole(arch: str, tmp_path: Path) -> None:
    """Save with the installed transformers, read with ours: the same logits, and nothing unread."""
    _, model = tiny_models.make(arch)
    model.save_pretrained(tmp_path)
    with pytest.warns(MissingTokenizer):
        found = resolve(str(tmp_path))
    assert not found.unread
    ids = torch.arange(3, 20)[None]
    torch.testing.assert_close(found.load_model(torch.float32)(ids).logits, model(ids).logits)


def test_dynamic_frequencies_are_static_up_to_the_last_position(tmp_path: Path) -> None:
    """InternLM 2.5 and 3 are published so: the base changes beyond ``max_position_embeddings`` only."""
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 6.0}
    _, model = tiny_models.make("internlm3", rope_parameters=rope)
    model.save_pretrained(tmp_path)
    with pytest.warns(MissingTokenizer):
        found = resolve(str(tmp_path))
    check_supported(found.config)
    assert positions_of(found.config) == tiny_models.MAX_POSITIONS
    ids = torch.arange(tiny_models.MAX_POSITIONS)[None] % 300
    mine = found.load_model(torch.float32)
    torch.testing.assert_close(mine(ids).logits, model(ids).logits)
    assert mine.model.rotary_emb.rope_type == "default", "tracing must not see lengths"


def test_a_x_k1_as_it_is_published(tmp_path: Path) -> None:
    """A norm for every layer, also for those without experts, and no correction of the router."""
    _, model = tiny_models.make("axk1", num_hidden_layers=2)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.zero_()
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    kept = {name: tensor for name, tensor in stored.items() if "e_score_correction_bias" not in name}
    assert len(kept) == len(stored) - 1
    extra = {"model.layers.0.post_mlp_layernorm.weight": torch.full((64,), 3.0)}
    save_file(kept | extra, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.warns(MissingTokenizer):
        found = resolve(str(tmp_path))
    assert found.unread == {"model.layers.*.post_mlp_layernorm.weight": "a norm behind experts; this layer has none"}
    ids = torch.arange(3, 20)[None]
    torch.testing.assert_close(found.load_model(torch.float32)(ids).logits, model(ids).logits)


def published(arch: str, folder: Path, **values: Any) -> Path:
    """A checkpoint of ``arch`` whose config.json has ``values`` on top; ``...`` removes one."""
    tiny_models.save_checkpoint(arch, folder)
    edit_config(folder, **values)
    return folder


ROPE = {"rope_parameters": ..., "rope_theta": 1e6}
LONG: dict[str, tuple[str, dict[str, Any], int]] = {
    "qwen2.5, YaRN added by hand as its README says": (
        "qwen3",
        {
            **ROPE,
            "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
            "max_position_embeddings": 32768,
        },
        131072,
    ),
    "qwen3, whose own length is longer than the original one": (
        "qwen3",
        {
            **ROPE,
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
            "max_position_embeddings": 40960,
        },
        131072,
    ),
    "deepseek v3, which declares the product": (
        "deepseek_v3",
        {
            **ROPE,
            "rope_scaling": {
                **{"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "mscale": 1.0},
                **{"mscale_all_dim": 1.0, "beta_fast": 32, "beta_slow": 1},
            },
            "max_position_embeddings": 163840,
        },
        163840,
    ),
    "olmo 3, YaRN without the original length": (
        "olmo3",
        {
            **ROPE,
            "rope_scaling": {
                **{"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8192},
                **{"attention_factor": 1.2079441541679836, "beta_fast": 32, "beta_slow": 1},
            },
            "max_position_embeddings": 65536,
        },
        65536,
    ),
    "llama 3.1": (
        "llama",
        {
            **ROPE,
            "rope_scaling": {
                **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
                "original_max_position_embeddings": 8192,
            },
            "max_position_embeddings": 131072,
        },
        131072,
    ),
}


@pytest.mark.parametrize("case", LONG)
def test_positions_of_stretched_contexts(case: str, tmp_path: Path) -> None:
    arch, values, positions = LONG[case]
    config = load_config(published(arch, tmp_path / "model", **values), case, Trust.closed())
    check_supported(config)
    assert positions_of(config) == positions


ACCEPTED: dict[str, tuple[str, dict[str, Any]]] = {
    "a window of 0, as transformers writes it": ("qwen2_moe", {"sliding_window": 0, "use_sliding_window": False}),
    "a window that is switched off": ("mistral", {"sliding_window": 0}),
    "_attn_implementation": ("llama", {"_attn_implementation": "flash_attention_2"}),
    "attn_implementation": ("llama", {"attn_implementation": "flash_attention_2"}),
    "_experts_implementation": ("qwen3_moe", {"_experts_implementation": "sonicmoe"}),
    "_flash_attn_2_enabled": ("llama", {"_flash_attn_2_enabled": True, "use_cache": False, "pretraining_tp": 1}),
    "an empty quantization_config": ("llama", {"quantization_config": {}}),
    "no quantization_config": ("llama", {"quantization_config": None}),
    "mrope of an extracted text part": (
        "qwen3",
        {**ROPE, "rope_scaling": {"type": "mrope", "mrope_section": [2, 5, 5]}},
    ),
    "unused code of its own": ("llama", {"auto_map": {"AutoModelForCausalLM": "modeling.Model"}}),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_settings_of_published_configs_are_accepted(case: str, tmp_path: Path) -> None:
    arch, values = ACCEPTED[case]
    found = resolve(str(published(arch, tmp_path / "model", **values)))
    assert found.load_model(torch.float32)(torch.arange(5)[None]).logits.isfinite().all()


TOO_MUCH: dict[str, tuple[dict[str, Any], type[DsparkError], str]] = {
    "a window of 0 in a layer with a window": (
        {"sliding_window": 0, "layer_types": ["sliding_attention"] * 3},
        InvalidConfig,
        "sliding_window of 0",
    ),
    "weights under another name": ({"transformers_weights": "other.safetensors"}, InvalidConfig, "other.safetensors"),
}


@pytest.mark.parametrize("case", TOO_MUCH)
def test_settings_that_cannot_be_meant(case: str, tmp_path: Path) -> None:
    values, error, says = TOO_MUCH[case]
    with pytest.raises(error, match=says):
        resolve(str(published("olmo3", tmp_path / "model", **values)))


@pytest.mark.parametrize(
    ("content", "advice"), [(b"\n\x0e\n\x05<unk>", "pip install sentencepiece"), (b"IQ== 0\n", "pip install tiktoken")]
)
def test_a_tokenizer_model_alone_says_what_it_takes(content: bytes, advice: str, tmp_path: Path) -> None:
    folder = published("llama", tmp_path / "model")
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / file).unlink()
    (folder / "tokenizer.model").write_bytes(content)
    with pytest.raises(InvalidTokenizer, match=advice):
        resolve(str(folder))
