"""DeepSpec's own format: DSpark, DFlash (without heads) and Eagle3, with Qwen3 or Gemma 4 layers.

Its config is a copy of the target's with the draft's fields written over it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dspark_export.drafts.formats.block_fields import read_block
from dspark_export.drafts.formats.description import Description
from dspark_export.drafts.formats.draft import DraftConfig, EagleConfig, Family
from dspark_export.drafts.formats.fields import Fields
from dspark_export.drafts.formats.layers import read_layers

ARCHITECTURES: dict[str, tuple[str, Family]] = {
    "Qwen3DSparkModel": ("block", "qwen3"),
    "Gemma4DSparkModel": ("block", "gemma4"),
    "Qwen3Eagle3Model": ("eagle3", "qwen3"),
    "Eagle3DraftModel": ("eagle3", "qwen3"),
    "Gemma4Eagle3Model": ("eagle3", "gemma4"),
}


def read_deepspec(raw: Mapping[str, Any], where: str, architecture: str) -> Description:
    """The draft that ``raw`` describes; InvalidConfig with everything that is wrong."""
    kind, family = ARCHITECTURES[architecture]
    fields = Fields(raw, where)
    layers = read_layers(fields, family)
    target_layers = fields.whole("num_target_layers")
    vocab = fields.whole("vocab_size")
    taps = fields.ascending("target_layer_ids", -1 if kind == "block" else 0) or (0,)
    fields.neutral("tie_word_embeddings", False)
    config: DraftConfig
    if kind == "eagle3":
        fields.without_effect("step_loss_decay", "target_model_name_or_path")
        if layers.count != 1:
            fields.problem(f"num_hidden_layers is {layers.count}; EAGLE-3 drafts of one layer are supported")
        fields.neutral("draft_num_hidden_layers", layers.count)
        config = EagleConfig(layers, taps, fields.whole("ttt_length"), vocab, vocab, qk_norm=True)
        name = "DeepSpec Eagle3"
    else:
        fields.whole("num_anchors")
        fields.without_effect("ce_loss_alpha", "l1_loss_alpha", "confidence_head_alpha", "loss_decay_gamma")
        config = read_block(
            fields,
            layers,
            taps=taps,
            vocab=vocab,
            draft_vocab=vocab,
            block=fields.whole("block_size", high=4096),
            mask=fields.whole("mask_token_id", low=0),
            first_slot=0,
        )
        name = "DeepSpec DSpark" if config.markov != "none" or config.confidence else "DeepSpec DFlash"
    fields.finish()
    return Description(f"{name} ({family})", config, target_layers=target_layers, rope_copied=True)
