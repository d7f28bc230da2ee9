"""DFlash as z-lab stores it, and DSpark as SpecForge exports it: a Qwen3 config with a ``dflash_config`` inside.

Neither stores the embedding or the head. The row of the anchor predicts nothing unless the file says so: row k of a
block predicts its own position. The Python modules in such folders are never imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from dspark_export.drafts.formats.block_fields import plain_block, read_block
from dspark_export.drafts.formats.description import Description
from dspark_export.drafts.formats.draft import BlockConfig, DraftLayers, TapsRule
from dspark_export.drafts.formats.fields import Fields
from dspark_export.drafts.formats.layers import read_layers

ARCHITECTURES = ("DFlashDraftModel", "DSparkDraftModel")
INNER = "dflash_config"
_HEADS = ("markov_rank", "markov_head_type", "enable_confidence_head", "confidence_head_with_markov")
_EITHER = (*_HEADS, "block_size", "mask_token_id", "target_layer_ids", "sample_from_anchor", "causal", "projector_type")


def zlab_taps(target_layers: int, layers: int) -> tuple[int, ...]:
    """Taps of a draft whose config names none: spread over the target, which has ``target_layers``."""
    if layers == 1:
        return (target_layers // 2,)
    return tuple(round(1 + i * (target_layers - 4) / (layers - 1)) for i in range(layers))


def read_zlab(raw: Mapping[str, Any], where: str, architecture: str) -> Description:
    """The draft that ``raw`` describes; InvalidConfig with everything that is wrong."""
    fields = Fields(raw, where)
    inner = fields.inner(INNER)
    merged = _merged(fields, inner)
    layers = read_layers(fields, "qwen3", windows=True)
    vocab = fields.whole("vocab_size")
    fields.neutral("draft_vocab_size", vocab)
    fields.without_effect("tie_word_embeddings")
    target_layers = fields.whole("num_target_layers") if fields.has("num_target_layers") else None
    dspark = merged.choice("projector_type", ("dflash", "dspark"), _projector(architecture)) == "dspark"
    inner.neutral("attention_mode", "gqa")
    inner.neutral("shift_label", False)
    inner.without_effect("confidence_head_alpha", "attention_modes")
    modes = inner.raw("attention_modes")
    if modes is not None and modes != ["gqa"] * layers.count:
        inner.problem(f"{INNER}.attention_modes {modes!r} is not supported, all layers have to be 'gqa'")
    taps, rule = _taps(merged, layers, target_layers)
    first_slot: Literal[0, 1] = 0 if merged.flag("sample_from_anchor", False) else 1
    config = _block(merged, layers, taps, vocab, first_slot, dspark)
    fields.finish()
    return Description(
        "SpecForge DSpark" if dspark else "z-lab DFlash",
        config,
        target_layers=target_layers,
        taps_rule=rule,
        taps_count=len(taps) or layers.count,
    )


def _merged(fields: Fields, inner: Fields) -> Fields:
    """Fields that exports write at the top or inside; a difference between both is a problem."""
    found: dict[str, Any] = {}
    for key in _EITHER:
        values = [value for value in (fields.raw(key), inner.raw(key)) if value is not None]
        if len(values) == 2 and values[0] != values[1]:
            fields.problem(f"{key} is {values[0]!r}, and {values[1]!r} in {INNER}; make both agree")
        if values:
            found[key] = values[-1]
    return fields.view(found, f"{INNER}.")


def _projector(architecture: str) -> str:
    return "dspark" if architecture == "DSparkDraftModel" else "dflash"


def _taps(merged: Fields, layers: DraftLayers, target_layers: int | None) -> tuple[tuple[int, ...], TapsRule]:
    taps = merged.ascending("target_layer_ids", -1, None)
    if taps is not None or merged.raw("target_layer_ids") is not None:
        return taps or (0,), "given"
    return (() if target_layers is None else zlab_taps(target_layers, layers.count)), "zlab"


def _block(
    merged: Fields, layers: DraftLayers, taps: tuple[int, ...], vocab: int, first_slot: Literal[0, 1], dspark: bool
) -> BlockConfig:
    slides = any(window is not None for window in layers.windows)
    causal = slides and merged.flag("causal")  # the file has to say it: engines disagree about the default
    if not slides:
        merged.neutral("causal", False)
    elif causal and None in layers.windows:
        merged.problem("causal is true, and full_attention layers are not causal in any block draft supported here")
    common: dict[str, Any] = {
        "taps": taps,
        "vocab": vocab,
        "draft_vocab": vocab,
        "block": merged.whole("block_size", low=1 + first_slot, high=4096),
        "mask": merged.whole("mask_token_id", low=0),
        "first_slot": first_slot,
        "causal_windows": causal,
    }
    if dspark:
        return read_block(merged, layers, **common)
    for key in _HEADS:
        merged.neutral(key, 0, False)
    return plain_block(layers, **common)
