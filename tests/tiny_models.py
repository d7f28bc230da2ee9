"""Tiny random-weight models of every tested architecture, and whole checkpoints made from them, built on the spot."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

VOCAB = 384
MAX_POSITIONS = 512
WINDOW = 8
LAYERS = 3
BOS, EOS, PAD = 0, 1, 2

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_POSITIONS,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
    "initializer_range": 0.1,
}
_MLA: dict[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 24,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
}
_LOCAL_AND_GLOBAL = ["sliding_attention", "full_attention", "sliding_attention"]

_ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": (
        "LlamaConfig",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "mistral": ("MistralConfig", {"sliding_window": WINDOW}),
    "qwen2": (
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1, "tie_word_embeddings": True},
    ),
    "qwen3": ("Qwen3Config", {"head_dim": 24, "tie_word_embeddings": True}),
    "phi3": ("Phi3Config", {"sliding_window": WINDOW}),
    "gemma2": (
        "Gemma2Config",
        {
            "head_dim": 24,
            "query_pre_attn_scalar": 20,
            "sliding_window": WINDOW,
            "layer_types": _LOCAL_AND_GLOBAL,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 5.0,
        },
    ),
    "gemma3_text": (
        "Gemma3TextConfig",
        {"head_dim": 24, "query_pre_attn_scalar": 20, "sliding_window": WINDOW, "layer_types": _LOCAL_AND_GLOBAL},
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {
            "head_dim": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "mlp_only_layers": [1],
            "norm_topk_prob": True,
        },
    ),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "deepseek_v2": ("DeepseekV2Config", {**_MLA, "topk_method": "group_limited_greedy"}),
    "deepseek_v3": ("DeepseekV3Config", {**_MLA, "routed_scaling_factor": 1.5}),
    "gpt2": (
        "GPT2Config",
        {
            "n_embd": 64,
            "n_layer": LAYERS,
            "n_head": 4,
            "n_positions": MAX_POSITIONS,
            "scale_attn_by_inverse_layer_idx": True,
        },
    ),
    "smollm3": ("SmolLM3Config", {"no_rope_layers": [1, 0, 1], "tie_word_embeddings": True}),
    "olmo2": ("Olmo2Config", {}),
}

_HEADS_OF_16 = {"head_dim": 16}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_GROUPED_EXPERTS = {
    **_HEADS_OF_16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
_MLA_WITHOUT_EXPERTS = {
    name: _MLA[name]
    for name in (
        "num_key_value_heads", "kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"
    )
}  # fmt: skip
_SLIDING_THEN_FULL = {
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"],
    "num_hidden_layers": 2,
}
_GRANITE_SWA = {**_SLIDING_THEN_FULL, "layer_rope_theta": [500.0, 0]}
_PLAIN_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
_MORE: dict[str, dict[str, Any]] = {
    "arcee": {},
    "cohere": {"logit_scale": 0.3},
    "cohere2": {"sliding_window": WINDOW, "logit_scale": 0.3},
    "ernie4_5": _HEADS_OF_16,
    "exaone4": {"sliding_window": WINDOW},
    "gemma": _HEADS_OF_16,
    "gemma4_text": {
        **_HEADS_OF_16,
        "global_head_dim": 32,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention"],
        "num_hidden_layers": 2,
        "hidden_size_per_layer_input": 0,
        "final_logit_softcapping": 5.0,
    },
    "glm4": _HEADS_OF_16,
    "gpt_neox": {},
    "gpt_oss": {**_HEADS_OF_16, "num_local_experts": 4, "num_experts_per_tok": 2, **_SLIDING_THEN_FULL},
    "granite": {
        "logits_scaling": 3.0,
        "residual_multiplier": 0.5,
        "embedding_multiplier": 2.0,
        "attention_multiplier": 0.3,
    },
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "hunyuan_v1_dense": _HEADS_OF_16,
    "ministral": {**_HEADS_OF_16, "sliding_window": WINDOW},
    "ministral3": _HEADS_OF_16,
    "nemotron": {},
    "olmo": {},
    "olmo3": {"sliding_window": WINDOW},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "phi": {},
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 32},
    "seed_oss": _HEADS_OF_16,
    "stablelm": {},
    "starcoder2": {"sliding_window": WINDOW},
    "apertus": {},
    "axk1": _MLA,
    "biogpt": {},
    "bitnet": {},
    "cohere2_moe": {**_HEADS_OF_16, **_SLIDING_THEN_FULL, "num_experts": 4, "num_experts_per_tok": 2},
    "cwm": {**_SLIDING_THEN_FULL, **_PLAIN_ROPE},
    "diffllama": {},
    "dots1": _GROUPED_EXPERTS,
    "ernie4_5_moe": {
        **_HEADS_OF_16,
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": 32,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
    },
    "exaone_moe": {**_HEADS_OF_16, **_EXPERTS, "n_group": 1, "topk_group": 1, **_SLIDING_THEN_FULL},
    "flex_olmo": {"num_experts": 4, "num_experts_per_tok": 2},
    "glm": _HEADS_OF_16,
    "glm4_moe": {**_GROUPED_EXPERTS, "use_qk_norm": True},
    "glm4_moe_lite": {**_MLA, "n_group": 1},
    "gpt_bigcode": {},
    "granitemoehybrid": {
        "layer_types": ["full_attention"] * 2,
        "num_hidden_layers": 2,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "shared_intermediate_size": 96,
        "position_embedding_type": "rope",
    },
    "granitemoeshared": {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 32},
    "granite_swa": {**_GRANITE_SWA, "attention_multiplier": 0.3, "residual_multiplier": 0.5},
    "granitemoe_swa": {**_GRANITE_SWA, "num_local_experts": 4, "num_experts_per_tok": 2},
    "helium": _HEADS_OF_16,
    "hunyuan_v1_moe": {**_HEADS_OF_16, "num_experts": 4, "moe_topk": 2},
    "hy_v3": {**_HEADS_OF_16, **_EXPERTS},
    "hyperclovax": {},
    "internlm3": _HEADS_OF_16,
    "jais2": _HEADS_OF_16,
    "iquestcoder": _HEADS_OF_16,
    "kolibri1": {**_HEADS_OF_16, **_EXPERTS, "shared_expert_intermediate_size": 32, **_SLIDING_THEN_FULL},
    "laguna": {**_HEADS_OF_16, **_EXPERTS},
    "mellum": {**_HEADS_OF_16, **_EXPERTS},
    "mimo_v2_flash": {
        **_GROUPED_EXPERTS,
        **_SLIDING_THEN_FULL,
        "v_head_dim": 12,
        "mlp_layer_types": ["dense", "sparse"],
    },
    "minicpm3": _MLA_WITHOUT_EXPERTS,
    "minimax_m2": {**_HEADS_OF_16, "num_local_experts": 4, "num_experts_per_tok": 2, "rotary_dim": 8},
    "moshi": {"sliding_window": WINDOW, "ffn_dim": 96},
    "nanochat": {},
    "persimmon": {},
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2, **_PLAIN_ROPE},
    "solar_open": {**_GROUPED_EXPERTS},
    "vaultgemma": {**_HEADS_OF_16, "sliding_window": WINDOW},
    "youtu": _MLA_WITHOUT_EXPERTS,
}

ARCHITECTURES = tuple(_ARCHITECTURES)
"""Architectures that every parity test runs on, by their ``model_type``."""

MORE_ARCHITECTURES = tuple(_MORE)
"""Architectures with one parity test of their own (``tests/parity/test_more_architectures.py``)."""


def config(arch: str, **overrides: Any) -> PretrainedConfig:
    """The tiny configuration of ``arch``, a ``model_type``, with ``overrides`` on top."""
    if arch in _MORE:
        more: PretrainedConfig = CONFIG_MAPPING[arch](**{**_COMMON, **_MORE[arch], **overrides})
        return more
    class_name, special = _ARCHITECTURES[arch]
    settings = {**_COMMON, **special, **overrides}
    if arch == "gpt2":
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"):
            settings.pop(name)
        settings.pop("intermediate_size")
        settings.pop("max_position_embeddings")
    made: PretrainedConfig = getattr(transformers, class_name)(**settings)
    return made


def make(
    arch: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any
) -> tuple[PretrainedConfig, PreTrainedModel]:
    """A model of ``arch`` with random weights (the same for the same ``seed``), in eval mode.

    One-dimensional weights (norms, biases) are random as well, so that a graph which swaps two of them is found out.
    """
    torch.manual_seed(seed)
    made = config(arch, **overrides)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(made, dtype=dtype)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            with torch.no_grad():
                parameter.add_(torch.randn_like(parameter) * 0.1)
            assert name
    return model.config, model.eval().requires_grad_(False)


CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

_SPECIAL = ["<bos>", "<|end|>", "<pad>", "<|user|>", "<|assistant|>", "<|system|>"]


@functools.cache
def _trained_tokenizer(vocab: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[AddedToken(text, special=True, normalized=False) for text in _SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = Path(__file__).read_text(encoding="utf-8").split("\n")
    tokenizer.train_from_iterator(text, trainer)
    assert tokenizer.get_vocab_size() == vocab, tokenizer.get_vocab_size()
    return tokenizer


def tokenizer(vocab: int = VOCAB) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with exactly ``vocab`` entries and a chat template; any text round-trips."""
    return PreTrainedTokenizerFast(
        tokenizer_object=_trained_tokenizer(vocab),
        bos_token=_SPECIAL[BOS],
        eos_token=_SPECIAL[EOS],
        pad_token=_SPECIAL[PAD],
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_POSITIONS,
    )


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer in the manner of Llama 2 and Gemma: a character it has no token for becomes a token a byte."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "\u2581",
        *"abcdefghijklmnopqrstuvwxyz .,",
    ]
    vocab = {piece: token for token, piece in enumerate(pieces)}
    made = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in pieces[1:3]])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def save_checkpoint(arch: str, directory: Path, *, seed: int = 0, **overrides: Any) -> Path:
    """A complete local checkpoint of ``arch``: config, safetensors, generation config and tokenizer."""
    directory = Path(directory)
    _, model = make(arch, seed=seed, **overrides)
    model.save_pretrained(directory)
    tokenizer(model.config.get_text_config().vocab_size).save_pretrained(directory)
    return directory
