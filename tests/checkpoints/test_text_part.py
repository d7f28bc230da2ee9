"""The text part of a checkpoint that also reads images: the same logits as the whole model gives for a text."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, PreTrainedModel

from dspark_export.checkpoints import resolve
from dspark_export.checkpoints.text_part import TESTED_WRAPPERS
from dspark_export.checkpoints.tokenizer import MissingTokenizer
from dspark_runtime.errors import InvalidWeights, UnsupportedArchitecture

pytestmark = pytest.mark.filterwarnings("ignore::dspark_export.checkpoints.tokenizer.MissingTokenizer")
assert MissingTokenizer

FILE = "model.safetensors"
LAYERS = 3
TEXT: dict[str, Any] = {
    **{"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": LAYERS},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256},
    **{"initializer_range": 0.1, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
}
VISION: dict[str, Any] = {
    **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2},
    **{"image_size": 28, "patch_size": 14},
}
QWEN_VISION: dict[str, Any] = {
    **{"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "patch_size": 14, "out_hidden_size": 64},
    **{"intermediate_size": 64, "fullatt_block_indexes": [0], "deepstack_visual_indexes": [0]},
}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
WINDOWS = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}

WRAPPERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gemma3": ({**TEXT, **WINDOWS, "query_pre_attn_scalar": 20}, VISION),
    "gemma4": (
        {
            **{**TEXT, **WINDOWS, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]},
            **{"global_head_dim": 32, "num_global_key_value_heads": 1, "attention_k_eq_v": True},
            **{"hidden_size_per_layer_input": 0, "use_bidirectional_attention": "vision"},
        },
        {**VISION, "num_key_value_heads": 2, "head_dim": 16},
    ),
    "idefics3": ({**TEXT, "model_type": "llama"}, VISION),
    "internvl": ({**TEXT, "model_type": "qwen2"}, {**VISION, "image_size": [28, 28], "patch_size": [14, 14]}),
    "llava": ({**TEXT, "model_type": "llama"}, {"model_type": "clip_vision_model", **VISION}),
    "mistral3": ({**TEXT, "model_type": "mistral"}, {"model_type": "pixtral", **VISION}),
    "qwen2_5_vl": ({**TEXT, **MROPE}, QWEN_VISION),
    "qwen2_vl": ({**TEXT, **MROPE}, QWEN_VISION),
    "qwen3_vl": ({**TEXT, **MROPE}, QWEN_VISION),
    "qwen3_vl_moe": ({**TEXT, **MROPE, **EXPERTS}, QWEN_VISION),
    "smolvlm": ({**TEXT, "model_type": "llama"}, VISION),
}


def whole(kind: str, **settings: Any) -> PreTrainedModel:
    text, vision = WRAPPERS[kind]
    torch.manual_seed(0)
    made = CONFIG_MAPPING[kind](text_config=text, vision_config=vision, **settings)
    model: PreTrainedModel = AutoModelForImageTextToText.from_config(made, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            with torch.no_grad():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval().requires_grad_(False)


def check(folder: Path, model: PreTrainedModel) -> None:
    found = resolve(str(folder))
    ids = torch.arange(3, 30)[None]
    mine, theirs = found.load_model(torch.float32)(ids).logits, model(input_ids=ids).logits
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert "text only" in found.unread["vision_config"]
    assert any("vision" in name or "visual" in name for name in found.unread if name != "vision_config")


def test_every_wrapper_is_tested() -> None:
    assert set(WRAPPERS) == TESTED_WRAPPERS


@pytest.mark.parametrize("kind", sorted(WRAPPERS))
def test_logits_of_the_text_part_are_those_of_the_whole_model(kind: str, tmp_path: Path) -> None:
    model = whole(kind)
    model.save_pretrained(tmp_path)
    check(tmp_path, model)


def older(pattern: str, replacement: str) -> Callable[[str], str]:
    return lambda name: re.sub(pattern, replacement, name)


@pytest.mark.parametrize(
    ("kind", "rename"),
    [
        ("gemma3", older(r"^(?:model\.)?language_model\.(?:model\.)?", "language_model.model.")),
        ("mistral3", older(r"^(?:model\.)?language_model\.(?:model\.)?(?!lm_head)", "model.language_model.")),
        ("qwen2_5_vl", older(r"^(?:model\.)?language_model\.", "model.")),
        ("llava", older(r"^lm_head", "language_model.lm_head")),
    ],
)
def test_names_of_other_times(kind: str, rename: Callable[[str], str], tmp_path: Path) -> None:
    model = whole(kind)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / FILE)
    save_file({rename(name): tensor for name, tensor in stored.items()}, tmp_path / FILE, {"format": "pt"})
    check(tmp_path, model)


def test_a_part_nobody_knows_is_refused(tmp_path: Path) -> None:
    whole("gemma3").save_pretrained(tmp_path)
    stored = load_file(tmp_path / FILE) | {"language_model.model.layers.0.extra.weight": torch.ones(4)}
    save_file(stored, tmp_path / FILE, {"format": "pt"})
    with pytest.raises(InvalidWeights, match=r"extra\.weight"):
        resolve(str(tmp_path))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("qwen3_5", "linear_attention"),
        ("llama4", "chunked_attention"),
        ("gemma3n", "earlier ones"),
        ("mllama", "images"),
    ],
)
def test_refusals_give_the_reason_of_the_text_part(kind: str, reason: str, tmp_path: Path) -> None:
    CONFIG_MAPPING[kind]().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedArchitecture, match=reason):
        resolve(str(tmp_path))
