"""Names, shapes and dtypes of the graphs of trained drafters.

Beside the symbolic dimensions of :mod:`dspark_runtime.bundle.contract`: ``features`` (context rows new to the
drafter). Fixed for a drafter: ``block`` (rows of its block: the anchor and the masks), ``drafts`` (tokens it drafts,
``block`` or ``block`` - 1), ``draft_vocab`` (tokens it can draft), ``candidates`` (most likely tokens given per slot),
``nodes`` (of the tree of likely texts: ``candidates`` of the first slot, of every other slot those of each text that is
followed).

A **block** drafter (DSpark, DFlash) is one graph. Its pass appends the keys and values of new context rows to the
drafter's own cache, runs the block over them and returns tokens, distributions and confidences. Context rows go to the
slots ``[write_index, write_index + features)`` and the block after them, where the next pass overwrites it, as it does
padding rows of a ragged batch. ``attention_mask`` says which slots each block row sees: the context and the block,
never the padding between them.

An **eagle3** drafter is two graphs over one cache: ``<name>-extend`` reads the target's features, ``<name>-step`` the
hidden rows that the pass before it returned. Both return logits over the draft vocabulary.

A **draft model** is a separate decoder with the contract of ``target``.
"""

from __future__ import annotations

from collections.abc import Sequence

from dspark_runtime.bundle.contract import (
    ATTENTION_MASK,
    INPUT_IDS,
    LOGIT_ROWS,
    LOGITS,
    POSITION_IDS,
    WRITE_INDICES,
    CacheLayer,
    GraphContract,
    TensorSpec,
    past_name,
    present_name,
)

TARGET_FEATURES = "target_features"
FEATURE_POSITIONS = "feature_positions"
ANCHOR_IDS = "anchor_ids"
BLOCK_POSITIONS = "block_positions"
TEMPERATURE = "temperature"
UNIFORMS = "uniforms"
DRAFT_TOKENS = "draft_tokens"
DRAFT_PROBS = "draft_probs"
CANDIDATE_TOKENS = "candidate_tokens"
CANDIDATE_PROBS = "candidate_probs"
BEAM_TOKENS = "beam_tokens"
BEAM_PROBS = "beam_probs"
BEAM_PARENTS = "beam_parents"
CONFIDENCE_LOGITS = "confidence_logits"
DRAFT_HIDDEN = "draft_hidden"
RECURRENT_HIDDEN = "recurrent_hidden"

EXTEND = "-extend"
STEP = "-step"

# Intermediates of a block drafter's graph, by the name their value has inside it.
CTX_FEATURES = "ctx_features"
BLOCK_HIDDEN = "block_hidden"
BASE_LOGITS = "base_logits"
CORRECTED_LOGITS = "corrected_logits"


def block_contract(
    name: str,
    cache: Sequence[CacheLayer],
    dtype: str,
    *,
    features_width: int,
    block: int,
    drafts: int,
    draft_vocab: int,
    candidates: int,
    nodes: int,
    confidence: bool,
) -> GraphContract:
    """Contract of a block drafter.

    ``features_width`` is taps x hidden size of the target. ``temperature`` 0 drafts greedily; ``uniforms`` in [0, 1)
    draw the tokens otherwise. ``draft_tokens`` and ``candidate_tokens`` are ids of the target's vocabulary,
    ``draft_probs`` are the distributions that tokens were drawn from, for the ``drawn`` sequences of the batch whose
    temperature is above 0, in order; ``candidate_probs`` those of the most likely tokens of each slot at temperature
    1, in falling order, after the drafted tokens before it. ``beam_tokens`` (ids of the target's vocabulary),
    ``beam_probs`` (at temperature 1, given the tokens above) and ``beam_parents`` (place of the node above, before its
    children; -1 for the anchor) are a tree of likely texts, slot by slot; siblings are in falling order. Without
    ``nodes`` these three outputs are absent.
    """
    past, present = _cache(cache, dtype)
    inputs = (
        TensorSpec(TARGET_FEATURES, dtype, ("batch", "features", features_width)),
        TensorSpec(FEATURE_POSITIONS, "int64", ("batch", "features")),
        TensorSpec(ANCHOR_IDS, "int64", ("batch",)),
        TensorSpec(BLOCK_POSITIONS, "int64", ("batch", block)),
        TensorSpec(ATTENTION_MASK, "bool", ("batch", 1, block, "kv_len")),
        TensorSpec(WRITE_INDICES, "int64", ("batch",)),
        TensorSpec(TEMPERATURE, "float32", ("batch",)),
        TensorSpec(UNIFORMS, "float32", ("batch", drafts)),
        *past,
    )
    outputs = [
        TensorSpec(DRAFT_TOKENS, "int64", ("batch", drafts)),
        TensorSpec(DRAFT_PROBS, "float32", ("drawn", drafts, draft_vocab)),
        TensorSpec(CANDIDATE_TOKENS, "int64", ("batch", drafts, candidates)),
        TensorSpec(CANDIDATE_PROBS, "float32", ("batch", drafts, candidates)),
    ]
    if nodes:
        outputs += [
            TensorSpec(BEAM_TOKENS, "int64", ("batch", nodes)),
            TensorSpec(BEAM_PROBS, "float32", ("batch", nodes)),
            TensorSpec(BEAM_PARENTS, "int64", ("batch", nodes)),
        ]
    if confidence:
        outputs.append(TensorSpec(CONFIDENCE_LOGITS, "float32", ("batch", drafts)))
    return GraphContract(name, inputs, (*outputs, *present))


def eagle_contract(
    name: str,
    cache: Sequence[CacheLayer],
    dtype: str,
    *,
    hidden_size: int,
    draft_vocab: int,
    features_width: int | None,
) -> GraphContract:
    """Contract of an EAGLE-3 graph; ``features_width`` (taps x hidden size) for ``-extend``, None for ``-step``.

    Row i holds the token *after* position i and the target's features (or the drafter's hidden row) *of* position i.
    """
    past, present = _cache(cache, dtype)
    hidden = (
        TensorSpec(RECURRENT_HIDDEN, dtype, ("batch", "tokens", hidden_size))
        if features_width is None
        else TensorSpec(TARGET_FEATURES, dtype, ("batch", "tokens", features_width))
    )
    inputs = (
        TensorSpec(INPUT_IDS, "int64", ("batch", "tokens")),
        hidden,
        TensorSpec(POSITION_IDS, "int64", ("batch", "tokens")),
        TensorSpec(ATTENTION_MASK, "bool", ("batch", 1, "tokens", "kv_len")),
        TensorSpec(WRITE_INDICES, "int64", ("batch",)),
        TensorSpec(LOGIT_ROWS, "int64", ("batch", "rows")),
        *past,
    )
    outputs = (
        TensorSpec(LOGITS, "float32", ("batch", "rows", draft_vocab)),
        TensorSpec(DRAFT_HIDDEN, dtype, ("batch", "tokens", hidden_size)),
        *present,
    )
    return GraphContract(name, inputs, outputs)


def _cache(cache: Sequence[CacheLayer], dtype: str) -> tuple[list[TensorSpec], list[TensorSpec]]:
    past, present = [], []
    for i, layer in enumerate(cache):
        for part, width in (("key", layer.key_dim), ("value", layer.value_dim)):
            shape = ("batch", layer.kv_heads, "capacity", width)
            past.append(TensorSpec(past_name(i, part), dtype, shape))
            present.append(TensorSpec(present_name(i, part), dtype, shape))
    return past, present
