"""Architectures that are read from GGUF files: what their settings mean in a transformers config, and how llama.cpp
stores their weights. One entry each in :data:`FAMILIES`; defaults are llama.cpp's where a file leaves a setting out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dspark_export.checkpoints.gguf_keys import Keys

Shapes = Mapping[str, tuple[int, ...]]
Reads = Callable[[Keys, "Facts"], dict[str, Any]]
"""From the settings to config values beyond the common ones; ``model_type`` among them chooses another type."""


@dataclass(frozen=True)
class Facts:
    """What every architecture has. ``head``: width of one head; ``stored``: all tensors of the file."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head: int
    rope: Mapping[str, Any]
    stored: Shapes

    def has(self, *suffixes: str) -> bool:
        """Whether some layer has a tensor whose name ends in one of ``suffixes``."""
        return any(name.endswith(suffixes) for name in self.stored if name.startswith("blk."))


@dataclass(frozen=True)
class Family:
    """How one architecture is read.

    ``interleaved``: neighbouring rotary dimensions of a head are paired, where transformers pairs its halves.
    ``norm_plus_one``: norms are stored with the one that transformers adds. ``transposed``: tensors that transformers
    keeps the other way round. ``names``: stems that gguf's own name table lacks, transformers' to llama.cpp's.
    """

    model_type: str
    reads: Reads
    interleaved: bool = False
    norm_plus_one: bool = False
    transposed: tuple[str, ...] = ()
    partial_rotary: bool = False
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


_EXPERTS = {
    "mlp.experts.gate_up_proj": ("ffn_gate_exps.weight", "ffn_up_exps.weight"),
    "mlp.experts.down_proj": ("ffn_down_exps.weight",),
}
_TIED_HEAD = {"lm_head.weight": ("token_embd.weight",)}


def _rms(keys: Keys) -> dict[str, Any]:
    return {"rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"), "rope_parameters": None}


def _window(keys: Keys) -> int | None:
    value = keys.get("attention.sliding_window", 0)
    return int(value) if value else None


def _layer_types(keys: Keys, layers: int, period: int) -> list[str]:
    """Kinds of layers: all but every ``period``-th have a window, unless the file says which."""
    pattern = keys.get("attention.sliding_window_pattern", period)
    if isinstance(pattern, int) and not isinstance(pattern, bool):
        pattern = [pattern == 0 or index % pattern < pattern - 1 for index in range(layers)]
    if not isinstance(pattern, list) or len(pattern) < layers:
        keys.refuse("attention.sliding_window_pattern", f"a number, or a value for each of {layers} layers is expected")
    return ["sliding_attention" if windowed else "full_attention" for windowed in pattern[:layers]]


def _llama(keys: Keys, facts: Facts) -> dict[str, Any]:
    values = {**_rms(keys), "sliding_window": _window(keys)}
    if experts := keys.get("expert_count", 0):
        return {
            **values,
            "model_type": "mixtral",
            "num_local_experts": experts,
            "num_experts_per_tok": keys.count("expert_used_count"),
            **_expert_width(keys, "intermediate_size"),
            **_routing(keys, normalised=True),
        }
    if values["sliding_window"]:
        return {**values, "model_type": "mistral"}
    values["attention_bias"] = facts.has("attn_q.bias", "attn_k.bias", "attn_v.bias", "attn_output.bias")
    values["mlp_bias"] = facts.has("ffn_gate.bias", "ffn_up.bias", "ffn_down.bias")
    return values


def _expert_width(keys: Keys, name: str) -> dict[str, int]:
    return {name: keys.count("expert_feed_forward_length")} if "expert_feed_forward_length" in keys else {}


def _routing(keys: Keys, normalised: bool) -> dict[str, Any]:
    """Softmax routing, the only kind these architectures have in transformers; ``normalised``: llama.cpp's default."""
    if keys.get("expert_gating_func", 0) not in (0, 1):
        keys.refuse("expert_gating_func", "experts are chosen by softmax only (1)")
    norm = bool(keys.get("expert_weights_norm", normalised))
    if normalised and not norm:
        keys.refuse("expert_weights_norm", "this architecture always normalises the weights of its experts")
    return {"norm_topk_prob": norm}


def _qwen2(keys: Keys, _: Facts) -> dict[str, Any]:
    window = _window(keys)
    windowed = {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 0} if window else {}
    return {**_rms(keys), **(windowed or {"use_sliding_window": False})}


def _qwen3(keys: Keys, facts: Facts) -> dict[str, Any]:
    return {**_qwen2(keys, facts), "attention_bias": facts.has("attn_q.bias")}


def _qwen_moe(keys: Keys, facts: Facts, normalised: bool) -> dict[str, Any]:
    experts, width = keys.count("expert_count"), keys.get("feed_forward_length", 0)
    dense = [index for index in range(facts.layers) if f"blk.{index}.ffn_gate_inp.weight" not in facts.stored]
    return {
        **_rms(keys),
        "num_experts": experts,
        "num_experts_per_tok": keys.count("expert_used_count"),
        "moe_intermediate_size": keys.count("expert_feed_forward_length", width or None),
        "mlp_only_layers": dense,
        "decoder_sparse_step": 1,
        "use_sliding_window": False,
        **_routing(keys, normalised),
    }


def _qwen2_moe(keys: Keys, facts: Facts) -> dict[str, Any]:
    width = keys.get("feed_forward_length", 0)
    shared = {"shared_expert_intermediate_size": keys.count("expert_shared_feed_forward_length", width or None)}
    return {**_qwen_moe(keys, facts, normalised=False), **shared, "qkv_bias": facts.has("attn_q.bias")}


def _qwen3_moe(keys: Keys, facts: Facts) -> dict[str, Any]:
    return {**_qwen_moe(keys, facts, normalised=True), "attention_bias": facts.has("attn_q.bias")}


def _gemma(keys: Keys, _: Facts) -> dict[str, Any]:
    return {**_rms(keys), "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}


def _query_scalar(keys: Keys, facts: Facts, layers_of_27b: int) -> float:
    """What scores are divided by the root of: llama.cpp tells Gemma's 27B sizes by their number of layers."""
    if scale := keys.number("attention.scale", 0.0):
        return 1.0 / scale**2
    return facts.width // facts.heads if facts.layers == layers_of_27b else facts.head


def _gemma2(keys: Keys, facts: Facts) -> dict[str, Any]:
    return {
        **_rms(keys),
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": _query_scalar(keys, facts, 46),
        "sliding_window": _window(keys) or 4096,
        "layer_types": _layer_types(keys, facts.layers, 2),
        "attn_logit_softcapping": keys.number("attn_logit_softcapping", 50.0) or None,
        "final_logit_softcapping": keys.number("final_logit_softcapping", 30.0) or None,
    }


def _gemma3(keys: Keys, facts: Facts) -> dict[str, Any]:
    local = {"rope_type": "default", "rope_theta": keys.number("rope.freq_base_swa", 10000.0)}
    return {
        **_rms(keys),
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": _query_scalar(keys, facts, 62),
        "sliding_window": keys.count("attention.sliding_window"),
        "layer_types": _layer_types(keys, facts.layers, 6),
        "attn_logit_softcapping": keys.number("attn_logit_softcapping", 0.0) or None,
        "final_logit_softcapping": keys.number("final_logit_softcapping", 0.0) or None,
        "rope_parameters": {"full_attention": dict(facts.rope), "sliding_attention": local},
    }


def _phi3(keys: Keys, facts: Facts) -> dict[str, Any]:
    original = facts.rope.get("original_max_position_embeddings") or keys.count("context_length")
    return {**_rms(keys), "sliding_window": _window(keys), "original_max_position_embeddings": original}


def _gpt2(keys: Keys, _: Facts) -> dict[str, Any]:
    return {
        "layer_norm_epsilon": keys.number("attention.layer_norm_epsilon"),
        "n_inner": keys.count("feed_forward_length"),
        "activation_function": "gelu_new",
    }


def _starcoder2(keys: Keys, facts: Facts) -> dict[str, Any]:
    return {
        "norm_epsilon": keys.number("attention.layer_norm_epsilon"),
        "rope_parameters": None,
        "sliding_window": _window(keys),
        "use_bias": facts.has("attn_q.bias", "ffn_up.bias"),
    }


def _stablelm(keys: Keys, facts: Facts) -> dict[str, Any]:
    keys.get("use_parallel_residual")  # llama.cpp goes by the tensors
    return {
        "layer_norm_eps": keys.number("attention.layer_norm_epsilon"),
        "rope_parameters": None,
        "use_qkv_bias": facts.has("attn_q.bias"),
        "use_parallel_residual": not facts.has("ffn_norm.weight"),
    }


def _nemotron(keys: Keys, facts: Facts) -> dict[str, Any]:
    return {
        "norm_eps": keys.number("attention.layer_norm_epsilon"),
        "rope_parameters": None,
        "attention_bias": facts.has("attn_q.bias"),
        "mlp_bias": facts.has("ffn_up.bias"),
    }


def _cohere(keys: Keys, facts: Facts) -> dict[str, Any]:
    return {
        "layer_norm_eps": keys.number("attention.layer_norm_epsilon"),
        "rope_parameters": None,
        "logit_scale": keys.number("logit_scale"),
        "use_qk_norm": facts.has("attn_q_norm.weight"),
        "attention_bias": facts.has("attn_q.bias"),
    }


def _cohere2(keys: Keys, facts: Facts) -> dict[str, Any]:
    values = {**_cohere(keys, facts), "sliding_window": keys.count("attention.sliding_window")}
    values.pop("use_qk_norm")
    return {**values, "layer_types": _layer_types(keys, facts.layers, 4)}


def _granite(keys: Keys, facts: Facts) -> dict[str, Any]:
    return {
        **_rms(keys),
        "logits_scaling": keys.number("logit_scale", 0.0) or 1.0,
        "residual_multiplier": keys.number("residual_scale", 0.0) or 1.0,
        "embedding_multiplier": keys.number("embedding_scale", 0.0) or 1.0,
        "attention_multiplier": keys.number("attention.scale", 0.0) or facts.head**-0.5,
        "attention_bias": facts.has("attn_q.bias"),
        "mlp_bias": facts.has("ffn_up.bias"),
    }


def _with_biases(keys: Keys, facts: Facts) -> dict[str, Any]:
    return {**_rms(keys), "attention_bias": facts.has("attn_q.bias"), "mlp_bias": facts.has("ffn_up.bias")}


def _seed_oss(keys: Keys, facts: Facts) -> dict[str, Any]:
    return {**_with_biases(keys, facts), "attention_out_bias": facts.has("attn_output.bias")}


def _phi2(keys: Keys, _: Facts) -> dict[str, Any]:
    return {"layer_norm_eps": keys.number("attention.layer_norm_epsilon"), "rope_parameters": None}


FAMILIES: dict[str, Family] = {
    "llama": Family("llama", _llama, interleaved=True, names=_EXPERTS),
    "arcee": Family("arcee", _with_biases, interleaved=True),
    "command-r": Family("cohere", _cohere, names=_TIED_HEAD),
    "cohere2": Family("cohere2", _cohere2, names=_TIED_HEAD),
    "gemma": Family("gemma", _gemma, norm_plus_one=True, names=_TIED_HEAD),
    "gemma2": Family("gemma2", _gemma2, norm_plus_one=True, names=_TIED_HEAD),
    "gemma3": Family("gemma3_text", _gemma3, norm_plus_one=True),
    "glm4": Family("glm4", _with_biases, partial_rotary=True),
    "gpt2": Family(
        "gpt2",
        _gpt2,
        transposed=("attn_qkv.weight", "attn_output.weight", "ffn_up.weight", "ffn_down.weight"),
    ),
    "granite": Family("granite", _granite, interleaved=True),
    "nemotron": Family("nemotron", _nemotron, norm_plus_one=True, partial_rotary=True),
    "olmo2": Family("olmo2", _with_biases),
    "phi2": Family("phi", _phi2, partial_rotary=True),
    "phi3": Family("phi3", _phi3, partial_rotary=True),
    "qwen2": Family("qwen2", _qwen2),
    "qwen2moe": Family("qwen2_moe", _qwen2_moe, names=_EXPERTS),
    "qwen3": Family("qwen3", _qwen3),
    "qwen3moe": Family("qwen3_moe", _qwen3_moe, names=_EXPERTS),
    "seed_oss": Family("seed_oss", _seed_oss),
    "smollm3": Family("smollm3", _with_biases, interleaved=True),
    "stablelm": Family("stablelm", _stablelm, partial_rotary=True),
    "starcoder2": Family("starcoder2", _starcoder2),
}
"""By llama.cpp's name of the architecture. Each is compared with llama.cpp in ``tests/checkpoints``."""
