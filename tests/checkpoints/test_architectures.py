"""Which architectures are refused, and that each refusal says why."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import CONFIG_MAPPING, PretrainedConfig

from dspark_export.checkpoints.architectures import TESTED, check_supported
from dspark_export.graphs.decoder import trace_without_weights
from dspark_runtime.errors import UnsupportedArchitecture
from tests import tiny_models

TINY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
}


def config(kind: str, **settings: Any) -> PretrainedConfig:
    made: PretrainedConfig = CONFIG_MAPPING[kind](**settings)
    return made


def test_tested_means_there_is_a_parity_test() -> None:
    assert {*tiny_models.ARCHITECTURES, *tiny_models.MORE_ARCHITECTURES} == TESTED


@pytest.mark.parametrize("arch", sorted(TESTED))
def test_tested_architectures_pass(arch: str) -> None:
    check_supported(tiny_models.config(arch))


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (lambda: config("bart"), "encoder"),
        (lambda: config("gpt2", add_cross_attention=True), "encoder"),
        (lambda: config("gemma3"), "vision_config"),
        (lambda: config("qwen2_vl"), "vision_config"),
        (lambda: config("bert"), "no parity test|no causal language model"),
        (lambda: config("distilbert"), "no causal language model"),
        (lambda: tiny_models.config("gemma3_text", use_bidirectional_attention=True), "bidirectional"),
        (lambda: config("mamba"), "recurrent state"),
        (lambda: config("jamba"), "recurrent state"),
        (lambda: config("rwkv"), "recurrent state"),
        (lambda: config("qwen3_next", **TINY), "linear_attention"),
        (lambda: config("llama4_text", **TINY), "chunked_attention"),
        (lambda: tiny_models.config("gemma4_text", num_kv_shared_layers=1), "keys and values of earlier ones"),
        (lambda: config("bloom"), "ALiBi"),
        (lambda: config("mpt"), "ALiBi"),
        (lambda: config("falcon", alibi=True), "ALiBi"),
        (lambda: tiny_models.config("gpt2", reorder_and_upcast_attn=True), "reorder_and_upcast_attn"),
        (lambda: tiny_models.config("phi3", rope_parameters=LONGROPE, original_max_position_embeddings=64), "longrope"),
        (lambda: config("moshi", **TINY, architectures=["MoshiForConditionalGeneration"]), "audio codes"),
        (lambda: config("gemma4_unified_text", **TINY), "no parity test covers"),
    ],
)
def test_refusals_name_the_architecture_and_the_reason(made: Any, reason: str) -> None:
    refused = made()
    with pytest.raises(UnsupportedArchitecture, match=reason) as caught:
        check_supported(refused)
    assert refused.model_type in str(caught.value)


@pytest.mark.parametrize("kind", ["gemma4_unified_text"])
def test_an_untested_architecture_may_be_tried(kind: str) -> None:
    check_supported(config(kind, **TINY), trial=trace_without_weights)


@pytest.mark.parametrize("kind", ["falcon", "gptj"])
def test_an_untested_architecture_that_cannot_be_traced_is_refused(kind: str) -> None:
    """Their attention is written out, not looked up, so no seam reaches it."""
    with pytest.raises(UnsupportedArchitecture, match="cannot be traced"):
        check_supported(config(kind, **TINY), trial=trace_without_weights)


@pytest.mark.parametrize("kind", ["bart", "bloom", "mamba"])
def test_allowing_untested_ones_overrides_no_known_reason(kind: str) -> None:
    with pytest.raises(UnsupportedArchitecture):
        check_supported(config(kind), trial=trace_without_weights)
