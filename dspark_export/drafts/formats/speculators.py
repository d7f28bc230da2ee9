"""Drafts of vLLM's speculators library: dspark, dflash and eagle3.

Tap ids count the embedding as 0, so they are one more than DeepSpec's. A reduced vocabulary comes with ``d2t``. Block
drafts and EAGLE-3 keep their layers' config in ``transformer_layer_config``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from dspark_export.drafts.formats.block_fields import plain_block, read_block
from dspark_export.drafts.formats.description import Description
from dspark_export.drafts.formats.draft import BlockConfig, DraftLayers, EagleConfig, TapsRule
from dspark_export.drafts.formats.fields import Fields
from dspark_export.drafts.formats.layers import read_layers

MARK = "speculators_model_type"
KINDS = ("dspark", "dflash", "eagle3")
LAYERS = "transformer_layer_config"
DEFAULT_TAPS = 3
_TRAINING = (
    *("num_anchors", "max_anchors", "ce_loss_alpha", "l1_loss_alpha", "confidence_head_alpha", "loss_decay_gamma"),
    *("pure_draft_prefix_len", "emb_dim", "gru_hidden_dim", "lambda_base_start", "lambda_base_decay_ratio", "auf"),
    *("enable_sp_ulysses", "has_no_defaults_at_init", "speculators_version", MARK),
)


def eagle3_taps(target_layers: int) -> tuple[int, ...]:
    """Taps of an EAGLE-3 draft whose config names none: inputs of layers 2, middle and third from the end."""
    return tuple(sorted({1, target_layers // 2 - 1, target_layers - 4}))


def read_speculators(raw: Mapping[str, Any], where: str, kind: str) -> Description:
    """The draft that ``raw`` describes; InvalidConfig with everything that is wrong."""
    fields = Fields(raw, where)
    inner = fields.inner(LAYERS)
    layers = read_layers(inner, "qwen3", windows=kind != "eagle3", old_theta=False)
    vocab = inner.whole("vocab_size")
    inner.without_effect("tie_word_embeddings")
    fields.without_effect("tie_word_embeddings", *_TRAINING)
    fields.neutral("target_hidden_size", layers.hidden_size)
    draft_vocab = fields.whole("draft_vocab_size", high=max(vocab, 1), default=vocab)
    proposed = _proposed(fields)
    if kind == "eagle3":
        description = _eagle(fields, inner, layers, vocab, draft_vocab, proposed)
    else:
        description = _block(fields, layers, kind, vocab, draft_vocab, proposed)
    fields.finish()
    return description


def _proposed(fields: Fields) -> int | None:
    """Tokens the config proposes per round, by its default method; None if it does not say."""
    settings = fields.inner("speculators_config", {})
    settings.without_effect("algorithm", "verifier")
    name, methods = settings.raw("default_proposal_method"), settings.raw("proposal_methods")
    if methods is None:
        return None
    if not isinstance(methods, list) or not all(isinstance(method, dict) for method in methods):
        settings.problem(f"speculators_config.proposal_methods must be a list of objects, it is {methods!r}")
        return None
    chosen = [method for method in methods if method.get("proposal_type") == name] or methods
    tokens = chosen[0].get("speculative_tokens") if chosen else None
    if tokens is not None and (isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1):
        settings.problem(f"speculative_tokens must be a positive whole number, it is {tokens!r}")
        return None
    return tokens


def _taps(fields: Fields, key: str) -> tuple[tuple[int, ...], TapsRule]:
    shifted = fields.ascending(key, 0, None)
    if shifted is None and fields.raw(key) is None:
        return (), "eagle3"
    return tuple(tap - 1 for tap in shifted or (1,)), "given"


def _eagle(
    fields: Fields, inner: Fields, layers: DraftLayers, vocab: int, draft_vocab: int, proposed: int | None
) -> Description:
    taps, rule = _taps(fields, "eagle_aux_hidden_state_layer_ids")
    kind = inner.choice("model_type", ("llama", "qwen3"))
    if layers.count != 1:
        fields.problem(f"{LAYERS}.num_hidden_layers is {layers.count}; EAGLE-3 drafts of one layer are supported")
    for key in ("norm_before_fc", "fc_norm", "norm_output"):
        fields.neutral(key, False)
    own_embedding = fields.flag("embed_requires_grad", False)
    config = EagleConfig(
        layers,
        taps,
        proposed or 3,
        vocab,
        draft_vocab,
        qk_norm=kind == "qwen3",
        norm_before_residual=fields.flag("norm_before_residual"),
    )
    return Description(
        "speculators eagle3",
        config,
        trained_embedding=own_embedding,
        trained_head=True,
        maps=True,
        taps_rule=rule,
        taps_count=len(taps) or DEFAULT_TAPS,
    )


def _block(
    fields: Fields, layers: DraftLayers, kind: str, vocab: int, draft_vocab: int, proposed: int | None
) -> Description:
    taps, rule = _taps(fields, "aux_hidden_state_layer_ids")
    fields.neutral("projector_type", kind)
    fields.neutral("shift_label", False)
    first_slot: Literal[0, 1] = 0 if fields.flag("sample_from_anchor", kind == "dspark") else 1
    slides = any(window is not None for window in layers.windows)
    common: dict[str, Any] = {
        "taps": taps,
        "vocab": vocab,
        "draft_vocab": draft_vocab,
        "block": fields.whole("block_size", low=1 + first_slot, high=4096),
        "mask": fields.whole("mask_token_id", low=0),
        "first_slot": first_slot,
        "causal_windows": not fields.flag("sliding_window_non_causal", False) and slides,
    }
    config: BlockConfig = read_block(fields, layers, **common) if kind == "dspark" else plain_block(layers, **common)
    if proposed is not None and proposed > config.drafts:
        fields.problem(
            f"speculative_tokens is {proposed}, but a block of {config.block} drafts {config.drafts} "
            f"with sample_from_anchor {str(not first_slot).lower()}"
        )
    return Description(f"speculators {kind}", config, maps=True, taps_rule=rule, taps_count=len(taps) or DEFAULT_TAPS)
