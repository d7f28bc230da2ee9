"""Tiny models of many architectures as GGUF files, laid out as llama.cpp's converter does, with the settings that
change a model's numbers. The model each file was written from is the reference; llama.cpp is another."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import PreTrainedModel

from tests.checkpoints.gguf_samples import byte_vocabulary, rotated_halves_interleaved, write_gguf
from tests.tiny_models import make

SIZES: dict[str, Any] = {
    **{"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "head_dim": 16},
    **{"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": None, "tie_word_embeddings": False},
}
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
INTERLEAVED = ("llama", "granite", "smollm3", "arcee")
PLUS_ONE = ("gemma", "gemma2", "gemma3", "nemotron")
LAYER_NORM = ("gpt2", "starcoder2", "stablelm", "nemotron", "command-r", "cohere2", "phi2")
Tensors = dict[str, np.ndarray]


@dataclass(frozen=True)
class Case:
    """``kind`` as transformers names it, with ``config`` values; ``arch`` as llama.cpp does, with its ``keys``.

    ``edit`` changes the tensors before they are written; ``llama_cpp``: why llama.cpp cannot be the reference, if so.
    """

    kind: str
    arch: str
    config: dict[str, Any] = field(default_factory=dict)
    keys: dict[str, Any] = field(default_factory=dict)
    edit: Callable[[Tensors], object] = lambda tensors: None
    llama_cpp: str = ""


def rope(kind: str, theta: float = 10000.0, **settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **settings}}


def llama3_factors(theta: float, factor: float, low: float, high: float, original: int, dims: int) -> np.ndarray:
    """``rope_freqs.weight`` as the converter computes it for Llama 3.1 and later."""
    found = []
    for index in range(0, dims, 2):
        length = 2 * math.pi * theta ** (index / dims)
        if length < original / high:
            found.append(1.0)
        elif length > original / low:
            found.append(factor)
        else:
            smooth = (original / length - low) / (high - low)
            found.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(found, np.float32)


def split_experts(tensors: Tensors) -> None:
    """One tensor per expert, as files were written until 2024."""
    for name in [name for name in tensors if "_exps." in name]:
        for expert, weight in enumerate(tensors.pop(name)):
            tensors[name.replace("_exps.", f".{expert}.")] = weight


def _adds(**extra: Any) -> Callable[[Tensors], object]:
    named = {name.replace("__", "."): np.array(value, np.float32) for name, value in extra.items()}
    return lambda tensors: tensors.update(named)


_SHORT, _LONG = [1.0 + 0.05 * i for i in range(8)], [2.0 + i for i in range(8)]
_LLAMA3 = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
_GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": PLAIN_ROPE,
}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_MOE_KEYS = {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 32}
_SCALED = {"rope.freq_base": 10000.0, "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}
_GEMMA = {"tie_word_embeddings": True, "query_pre_attn_scalar": 16, "sliding_window": 16}
_GEMMA2 = {**_GEMMA, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}

CASES: dict[str, Case] = {
    "llama": Case("llama", "llama", rope("default", 500000.0), {"rope.freq_base": 500000.0}),
    "llama 3.1": Case(
        "llama",
        "llama",
        rope("llama3", 500000.0, **_LLAMA3),
        {"rope.freq_base": 500000.0, "rope.dimension_count": 16},
        _adds(rope_freqs__weight=llama3_factors(500000.0, 32.0, 1.0, 4.0, 32, 16)),
    ),
    "llama, linear": Case(
        "llama",
        "llama",
        rope("linear", factor=4.0),
        {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0, "rope.scaling.finetuned": True},
    ),
    "llama, linear under its old name": Case("llama", "llama", rope("linear", factor=2.0), {"rope.scale_linear": 2.0}),
    "llama, scaling none": Case(
        "llama", "llama", rope("default"), {"rope.scaling.type": "none", "rope.scaling.factor": 4.0}
    ),
    "llama, biases": Case("llama", "llama", {**rope("default"), "attention_bias": True, "mlp_bias": True}),
    "llama, wide heads": Case(
        "llama",
        "llama",
        {**rope("default"), "head_dim": 32},
        {"attention.key_length": 32, "attention.value_length": 32, "rope.dimension_count": 32},
    ),
    "mixtral": Case(
        "mixtral",
        "llama",
        {**rope("default", 1e6), "num_local_experts": 4, "num_experts_per_tok": 2},
        {"rope.freq_base": 1e6, "expert_count": 4, "expert_used_count": 2},
    ),
    "mixtral, one tensor per expert": Case(
        "mixtral",
        "llama",
        {**rope("default", 1e6), "num_local_experts": 4, "num_experts_per_tok": 2},
        {"rope.freq_base": 1e6, "expert_count": 4, "expert_used_count": 2},
        split_experts,
        llama_cpp="newer versions refuse such files",
    ),
    "qwen2": Case("qwen2", "qwen2", {**rope("default", 1e6), "use_sliding_window": False}, {"rope.freq_base": 1e6}),
    "qwen2, yarn": Case(
        "qwen2",
        "qwen2",
        {**rope("yarn", factor=4.0, original_max_position_embeddings=32), "use_sliding_window": False},
        {**_SCALED, "rope.scaling.original_context_length": 32},
    ),
    "qwen3, yarn with its betas": Case(
        "qwen3",
        "qwen3",
        rope("yarn", factor=4.0, original_max_position_embeddings=32, beta_fast=16.0, beta_slow=2.0),
        {
            **_SCALED,
            "rope.scaling.original_context_length": 32,
            "rope.scaling.yarn_beta_fast": 16.0,
            "rope.scaling.yarn_beta_slow": 2.0,
        },
        llama_cpp="it reads the betas of some architectures only",
    ),
    "qwen2moe": Case(
        "qwen2_moe",
        "qwen2moe",
        {**rope("default", 1e6), **_MOE, "shared_expert_intermediate_size": 48, "norm_topk_prob": False},
        {"rope.freq_base": 1e6, **_MOE_KEYS, "expert_shared_feed_forward_length": 48},
    ),
    "qwen3moe": Case(
        "qwen3_moe",
        "qwen3moe",
        {**rope("default", 1e6), **_MOE, "mlp_only_layers": [], "norm_topk_prob": True},
        {"rope.freq_base": 1e6, **_MOE_KEYS},
    ),
    "gemma": Case("gemma", "gemma", {**rope("default"), "tie_word_embeddings": True}),
    "gemma2": Case(
        "gemma2",
        "gemma2",
        {**rope("default"), **_GEMMA2, "layer_types": ["sliding_attention", "full_attention"]},
        {"attention.sliding_window": 16, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    ),
    "gemma2 27B": Case(
        "gemma2",
        "gemma2",
        {
            **rope("default"),
            **_GEMMA2,
            **{"num_hidden_layers": 46, "hidden_size": 32, "intermediate_size": 32, "query_pre_attn_scalar": 8},
            "layer_types": ["sliding_attention", "full_attention"] * 23,
        },
        {"attention.sliding_window": 16},
    ),
    "gemma3 4B": Case(
        "gemma3_text",
        "gemma3",
        {
            **_GEMMA,
            "rope_parameters": _GEMMA3_ROPE,
            "num_hidden_layers": 6,
            "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
        },
        {
            "rope.freq_base": 1e6,
            "rope.scaling.type": "linear",
            "rope.scaling.factor": 8.0,
            "attention.sliding_window": 16,
        },
    ),
    "gemma3, local base": Case(
        "gemma3_text",
        "gemma3",
        {
            **_GEMMA,
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
            },
            "num_hidden_layers": 6,
            "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
        },
        {"rope.freq_base": 1e6, "rope.freq_base_swa": 5000.0, "attention.sliding_window": 16},
    ),
    "phi3, partial": Case(
        "phi3",
        "phi3",
        {**rope("default", partial_rotary_factor=0.75), "sliding_window": None},
        {"rope.dimension_count": 12, "attention.sliding_window": 0},
    ),
    "phi3, longrope": Case(
        "phi3",
        "phi3",
        {
            **rope(
                "longrope",
                short_factor=_SHORT,
                long_factor=_LONG,
                original_max_position_embeddings=256,
                attention_factor=1.2,
            ),
            "original_max_position_embeddings": 256,
            "max_position_embeddings": 512,
            "sliding_window": None,
        },
        {"rope.scaling.original_context_length": 256, "rope.scaling.attn_factor": 1.2},
        _adds(rope_factors_short__weight=_SHORT, rope_factors_long__weight=_LONG),
    ),
    "gpt2": Case("gpt2", "gpt2", {"tie_word_embeddings": True, "scale_attn_by_inverse_layer_idx": False}),
    "starcoder2": Case(
        "starcoder2",
        "starcoder2",
        {**rope("default", 1e6), "sliding_window": None, "use_bias": True},
        {"rope.freq_base": 1e6},
    ),
    "stablelm": Case(
        "stablelm",
        "stablelm",
        {**rope("default", partial_rotary_factor=0.5), "use_qkv_bias": True},
        {"rope.dimension_count": 8, "use_parallel_residual": False},
    ),
    "nemotron": Case("nemotron", "nemotron", rope("default", partial_rotary_factor=0.5), {"rope.dimension_count": 8}),
    "command-r": Case(
        "cohere",
        "command-r",
        {**rope("default"), "logit_scale": 0.25, "tie_word_embeddings": True},
        {"logit_scale": 0.25},
    ),
    "cohere2": Case(
        "cohere2",
        "cohere2",
        {
            **rope("default"),
            **{"logit_scale": 0.25, "sliding_window": 16, "tie_word_embeddings": True, "num_hidden_layers": 4},
            "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
        },
        {"logit_scale": 0.25, "attention.sliding_window": 16},
    ),
    "granite": Case(
        "granite",
        "granite",
        {
            **rope("default"),
            **{"logits_scaling": 4.0, "residual_multiplier": 0.5, "embedding_multiplier": 3.0},
            "attention_multiplier": 0.1,
        },
        {"logit_scale": 4.0, "residual_scale": 0.5, "embedding_scale": 3.0, "attention.scale": 0.1},
    ),
    "olmo2": Case("olmo2", "olmo2", rope("default")),
    "smollm3": Case("smollm3", "smollm3", {**rope("default"), "num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0]}),
    "arcee": Case("arcee", "arcee", rope("default")),
    "seed_oss": Case("seed_oss", "seed_oss", {**rope("default"), "attention_bias": True}),
    "glm4": Case("glm4", "glm4", rope("default", partial_rotary_factor=0.5), {"rope.dimension_count": 8}),
    "phi2": Case("phi", "phi2", rope("default", partial_rotary_factor=0.5), {"rope.dimension_count": 8}),
}


def original(case: Case) -> PreTrainedModel:
    """The model a file is written from."""
    settings = {**SIZES, **case.config}
    if case.kind == "gpt2":
        settings |= {"n_positions": settings["max_position_embeddings"], "n_layer": 2}
        for name in (*SIZES, "head_dim"):
            if name not in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings"):
                settings.pop(name, None)
    return make(case.kind, **settings)[1]


def tensors_of(model: PreTrainedModel, arch: str) -> Tensors:
    """The weights as llama.cpp's converter stores them, with its names."""
    settings = model.config
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(kinds[arch], settings.num_hidden_layers)
    found: Tensors = {}
    for name, parameter in model.state_dict().items():
        weight = parameter.float().numpy()
        if name == "lm_head.weight" and settings.tie_word_embeddings:
            continue
        if name.endswith("experts.gate_up_proj"):
            layer = name.split(".")[2]
            found[f"blk.{layer}.ffn_gate_exps.weight"], found[f"blk.{layer}.ffn_up_exps.weight"] = np.split(
                weight, 2, 1
            )
            continue
        if name.endswith("experts.down_proj"):
            found[f"blk.{name.split('.')[2]}.ffn_down_exps.weight"] = weight
            continue
        stem, _, suffix = name.rpartition(".")
        stored = f"{table.get_name(stem)}.{suffix}"
        if arch in INTERLEAVED and ("q_proj" in name or "k_proj" in name):
            heads = settings.num_attention_heads if "q_proj" in name else settings.num_key_value_heads
            weight = rotated_halves_interleaved(weight.reshape(len(weight), -1), heads).reshape(weight.shape)
        if arch in PLUS_ONE and stored.endswith("norm.weight"):
            weight = weight + np.float32(1)
        if arch == "gpt2" and ".h." in name and weight.ndim == 2:
            weight = weight.T
        if "shared_expert_gate" in name:
            weight = weight.reshape(-1)
        found[stored] = weight
    return found


def fields_of(model: PreTrainedModel, case: Case) -> dict[str, Any]:
    """The settings as the converter writes them, with those of the case."""
    settings = model.config
    epsilons = (
        getattr(settings, name, None) for name in ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps")
    )
    values = {
        "block_count": settings.num_hidden_layers,
        "context_length": settings.max_position_embeddings,
        "embedding_length": settings.hidden_size,
        "feed_forward_length": getattr(settings, "intermediate_size", None) or 4 * settings.hidden_size,
        "attention.head_count": settings.num_attention_heads,
        "attention.head_count_kv": getattr(settings, "num_key_value_heads", settings.num_attention_heads),
        "rope.freq_base": 10000.0,
        "attention.layer_norm_rms_epsilon": getattr(settings, "rms_norm_eps", None),
        "attention.layer_norm_epsilon": next((value for value in epsilons if value), None),
    }
    if (width := getattr(settings, "head_dim", None)) and width * settings.num_attention_heads != settings.hidden_size:
        values |= {"attention.key_length": width, "attention.value_length": width}
    if case.kind == "gpt2":
        del values["rope.freq_base"]
    named = {f"{case.arch}.{key}": value for key, value in (values | case.keys).items()}
    return {**named, **byte_vocabulary(), **({"tokenizer.ggml.pre": "gpt-2"} if case.kind == "gpt2" else {})}


def write_case(case: Case, path: Path) -> PreTrainedModel:
    """Write the case's file; returns the model it was written from."""
    model = original(case)
    tensors = {name: np.ascontiguousarray(weight) for name, weight in tensors_of(model, case.arch).items()}
    case.edit(tensors)
    write_gguf(path, fields_of(model, case), tensors, case.arch)
    return model


def texts(longest: int) -> list[list[int]]:
    """Texts of token ids, the longest beyond every window here."""
    random = np.random.default_rng(5)
    return [random.integers(3, 250, length).tolist() for length in (7, min(100, longest))]


@torch.no_grad()
def last_logits(model: PreTrainedModel, text: list[int]) -> np.ndarray:
    """Logits after the last token [vocab]."""
    result: np.ndarray = model(torch.tensor([text]), use_cache=False).logits[0, -1].double().numpy()
    return result
