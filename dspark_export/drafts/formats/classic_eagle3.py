"""EAGLE-3 drafts as its authors and SpecForge store them: one Llama layer named ``midlayer`` and a separate head.

``d2t`` holds offsets, ``t2d`` marks the tokens that can be drafted. Their config names no taps, unless SpecForge wrote
an ``eagle_config`` (outputs of 0-based layers) or vLLM's ``eagle_aux_hidden_state_layer_ids`` (one more).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from dspark_export.drafts.formats.description import Description
from dspark_export.drafts.formats.draft import EagleConfig, TapsRule
from dspark_export.drafts.formats.fields import Fields
from dspark_export.drafts.formats.layers import read_layers

ARCHITECTURES = ("LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM")
STEPS = 7
"""Drafts in a row: what the public training codes unroll."""

_LAYER = "midlayer."
_TAPS = "eagle_aux_hidden_state_layer_ids"


def rename(name: str) -> str:
    """DeepSpec's name of a stored tensor."""
    return f"layers.0.{name.removeprefix(_LAYER)}" if name.startswith(_LAYER) else name


def read_classic_eagle3(raw: Mapping[str, Any], where: str, stored: Collection[str]) -> Description:
    """The draft that ``raw`` and the names of its ``stored`` tensors describe; InvalidConfig lists what is wrong."""
    fields = Fields(raw, where)
    layers = read_layers(fields, "qwen3", old_theta=True)
    vocab = fields.whole("vocab_size")
    fields.without_effect("tie_word_embeddings")
    fields.neutral("target_hidden_size", layers.hidden_size)
    fields.without_effect("modal_type", "target_model_type")  # what the draft was made for
    fields.neutral("norm_before_fc", False)
    fields.neutral("norm_output", False)
    if layers.count != 1:
        fields.problem(f"num_hidden_layers is {layers.count}; EAGLE-3 drafts of one layer are supported")
    fields.without_effect("bias")  # whether fc has one is seen by its tensors
    taps, rule = _taps(fields)
    config = EagleConfig(
        layers,
        taps,
        STEPS,
        vocab,
        fields.whole("draft_vocab_size", high=max(vocab, 1), default=vocab),
        qk_norm=any(name.endswith("q_norm.weight") for name in stored),
        norm_before_residual=fields.flag("norm_before_residual", False),
        fc_bias="fc.bias" in stored,
    )
    target_layers = fields.whole("num_target_layers") if fields.has("num_target_layers") else None
    fields.finish()
    return Description(
        "EAGLE-3",
        config,
        rename=rename,
        trained_head=True,
        maps=True,
        target_layers=target_layers,
        taps_rule=rule,
        taps_count=len(taps) or 3,
    )


def _taps(fields: Fields) -> tuple[tuple[int, ...], TapsRule]:
    shifted = fields.ascending(_TAPS, 0, None)
    nested = fields.inner("eagle_config", {})
    _read_exporters_fields(nested)
    outputs = nested.ascending(_TAPS, -1, None)
    given = outputs or (None if shifted is None else tuple(tap - 1 for tap in shifted))
    return ((), "eagle3") if given is None else (given, "given")


def _read_exporters_fields(nested: Fields) -> None:
    """What NVIDIA's ModelOpt always writes into ``eagle_config``: values of the layer that is computed here."""
    nested.neutral("use_aux_hidden_state", True)
    nested.neutral("use_input_layernorm_in_first_layer", True)
    nested.neutral("use_last_layernorm", True)
    nested.neutral("use_mtp_layernorm", False)
    nested.neutral("next_layer_regular", True)
    nested.neutral("parallel_draft_step", 1)
    nested.neutral("eagle_decoder_type", "llama")
    nested.neutral("num_hidden_layers", 1)
    nested.without_effect("parallel_draft_heads_num_layers")  # of the heads that a parallel_draft_step above 1 has
    nested.without_effect("has_lm_head", "head_dim", "draft_vocab_size")  # seen by the tensors and the outer fields
