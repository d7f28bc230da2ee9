"""Decides from the config alone, before any weight is loaded, which architectures can be exported.

A type is *tested* when a parity test compares its graphs with plain transformers. Others are refused unless requested;
then the caller hands in a trial, so that what cannot be traced is still refused early.
"""

from __future__ import annotations

from collections.abc import Callable

from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from dspark_export.checkpoints.config import MEDIA
from dspark_export.checkpoints.rotary import is_static, rope_sets
from dspark_runtime.errors import UnsupportedArchitecture

TESTED = frozenset(
    [
        "apertus",
        "arcee",
        "axk1",
        "biogpt",
        "bitnet",
        "cohere",
        "cohere2",
        "cohere2_moe",
        "cwm",
        "deepseek_v2",
        "deepseek_v3",
        "diffllama",
        "dots1",
        "ernie4_5",
        "ernie4_5_moe",
        "exaone4",
        "exaone_moe",
        "flex_olmo",
        "gemma",
        "gemma2",
        "gemma3_text",
        "gemma4_text",
        "glm",
        "glm4",
        "glm4_moe",
        "glm4_moe_lite",
        "gpt2",
        "gpt_bigcode",
        "gpt_neox",
        "gpt_oss",
        "granite",
        "granite_swa",
        "granitemoe",
        "granitemoe_swa",
        "granitemoehybrid",
        "granitemoeshared",
        "helium",
        "hunyuan_v1_dense",
        "hunyuan_v1_moe",
        "hy_v3",
        "hyperclovax",
        "internlm3",
        "iquestcoder",
        "jais2",
        "kolibri1",
        "laguna",
        "llama",
        "mellum",
        "mimo_v2_flash",
        "minicpm3",
        "minimax_m2",
        "ministral",
        "ministral3",
        "mistral",
        "mixtral",
        "moshi",
        "nanochat",
        "nemotron",
        "olmo",
        "olmo2",
        "olmo3",
        "olmoe",
        "opt",
        "persimmon",
        "phi",
        "phi3",
        "phimoe",
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_moe",
        "seed_oss",
        "smollm3",
        "solar_open",
        "stablelm",
        "starcoder2",
        "vaultgemma",
        "youtu",
    ]
)
"""``model_type`` of every architecture with a parity test."""

ROPE_TYPES = frozenset({"default", "dynamic", "linear", "llama3", "longrope", "proportional", "yarn"})
"""Rotary embeddings whose frequencies do not depend on how long the text has become; ``dynamic`` with a fixed alpha,
``longrope`` up to its original length."""

_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
_RECURRENT = ("mamba", "rwkv", "xlstm", "recurrent", "jamba", "bamba", "zamba", "falcon_h1", "nemotron_h")
_ALIBI = ("bloom", "mpt")


Trial = Callable[[PretrainedConfig], None]
"""Raises UnsupportedArchitecture for a model that cannot be exported, having tried."""


def check_supported(config: PretrainedConfig, *, trial: Trial | None = None) -> None:
    """Return if the model that ``config`` describes can be exported.

    Args:
        trial: also accept a type without a parity test, if it passes this one; None refuses it.

    Raises:
        UnsupportedArchitecture: with the reason, and with what can be done about it where something can.
    """
    kind = config.model_type
    for find_reason in _RULES:
        reason = find_reason(config)
        if reason is not None:
            raise UnsupportedArchitecture(f"{kind}: {reason}")
    if kind in TESTED:
        return
    if trial is None:
        raise UnsupportedArchitecture(
            f"{kind}: no parity test covers this architecture; tested are {', '.join(sorted(TESTED))}. Pass "
            "--allow-untested-architecture to try it, and compare its output with transformers before you trust it"
        )
    trial(config)


def _encoder_decoder(config: PretrainedConfig) -> str | None:
    if config.is_encoder_decoder or getattr(config, "add_cross_attention", False):
        return "it has an encoder and cross-attention; only decoders that read just their own text can be exported"
    return None


def _media(config: PretrainedConfig) -> str | None:
    for name in MEDIA:
        if getattr(config, name, None) is not None:
            return (
                f"it also reads images or sound ({name}), and the text part of this type is not tested; give a "
                "text-only checkpoint of the family, or pass --allow-untested-architecture to try the text part"
            )
    return None


def _speech(config: PretrainedConfig) -> str | None:
    if config.model_type == "moshi" and "MoshiForConditionalGeneration" in (config.architectures or ()):
        return (
            "every step of it reads the audio codes of two speakers besides a token of text, and a bundle reads text "
            "only; a checkpoint of MoshiForCausalLM alone, which does too, builds"
        )
    return None


def _not_causal(config: PretrainedConfig) -> str | None:
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return "transformers has no causal language model of this type"
    both_ways = getattr(config, "use_bidirectional_attention", None) not in (None, False, "vision")  # text is causal
    if both_ways or getattr(config, "is_causal", True) is False:
        return "its attention is bidirectional: it embeds texts and does not continue them"
    return None


def _recurrent(config: PretrainedConfig) -> str | None:
    if any(part in config.model_type for part in _RECURRENT):
        return (
            "it keeps a recurrent state. Rejected draft tokens can be dropped from a key/value cache but not from a "
            "state, so only attention decoders can be exported"
        )
    return None


def _layer_types(config: PretrainedConfig) -> str | None:
    unknown = sorted(set(getattr(config.get_text_config(), "layer_types", None) or ()) - _LAYER_TYPES)
    if unknown:
        return (
            f"layers of the kind {', '.join(unknown)} cannot be verified under a tree mask; "
            f"known are {' and '.join(sorted(_LAYER_TYPES))}"
        )
    return None


def _shared_caches(config: PretrainedConfig) -> str | None:
    shared = getattr(config.get_text_config(), "num_kv_shared_layers", 0) or 0
    if shared:
        return (
            f"its last {shared} layers read the keys and values of earlier ones (num_kv_shared_layers), and a graph "
            "here has a cache for each layer; choose a model of the family without them, such as Gemma 4's larger ones"
        )
    return None


def _attention_extras(config: PretrainedConfig) -> str | None:
    if config.model_type in _ALIBI or getattr(config, "alibi", False):
        return "it places tokens by an attention bias (ALiBi), which a bool mask cannot carry"
    if getattr(config, "reorder_and_upcast_attn", False):
        return "reorder_and_upcast_attn goes around transformers' attention interface; set it to false in config.json"
    return None


def _rope(config: PretrainedConfig) -> str | None:
    text = config.get_text_config()
    for parameters in rope_sets(text):
        kind = parameters.get("rope_type", "default")
        if kind not in ROPE_TYPES or not is_static(parameters, getattr(text, "max_position_embeddings", 0)):
            return (
                f"its rotary embedding is of type {kind}, whose frequencies depend on the length of the text: cached "
                f"keys would have to change as it grows. Supported are {', '.join(sorted(ROPE_TYPES))}"
            )
    return None


_RULES: tuple[Callable[[PretrainedConfig], str | None], ...] = (
    _encoder_decoder,
    _media,
    _speech,
    _recurrent,
    _not_causal,
    _layer_types,
    _shared_caches,
    _attention_extras,
    _rope,
)
