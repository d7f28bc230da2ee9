"""Fields of block drafts that several formats share: the heads, and how block rows see each other."""

from __future__ import annotations

from typing import Literal, cast

from dspark_export.drafts.formats.draft import BlockConfig, DraftLayers, MarkovType
from dspark_export.drafts.formats.fields import Fields

_MARKOV_TYPES = ("vanilla", "gated", "rnn")


def read_block(
    heads: Fields,
    layers: DraftLayers,
    *,
    taps: tuple[int, ...],
    vocab: int,
    draft_vocab: int,
    block: int,
    mask: int,
    first_slot: Literal[0, 1],
    causal_windows: bool = False,
) -> BlockConfig:
    """A block draft from what was read, and the Markov and confidence heads that ``heads`` describes."""
    rank = heads.whole("markov_rank", low=0, high=65536)
    markov: MarkovType = "none"
    heads.without_effect("markov_head_type", "confidence_head_with_markov")
    if rank:
        markov = cast(MarkovType, heads.choice("markov_head_type", _MARKOV_TYPES))
    confidence = heads.flag("enable_confidence_head")
    with_markov = confidence and heads.flag("confidence_head_with_markov")
    if with_markov and not rank:
        heads.problem("confidence_head_with_markov is true, and markov_rank 0 leaves it nothing to read")
    return BlockConfig(
        layers=layers,
        taps=taps,
        block=block,
        first_slot=first_slot,
        mask_token_id=mask,
        vocab_size=vocab,
        draft_vocab_size=draft_vocab,
        markov=markov,
        markov_rank=rank,
        confidence=confidence,
        confidence_with_markov=with_markov,
        causal_windows=causal_windows,
    )


def plain_block(
    layers: DraftLayers,
    *,
    taps: tuple[int, ...],
    vocab: int,
    draft_vocab: int,
    block: int,
    mask: int,
    first_slot: Literal[0, 1],
    causal_windows: bool = False,
) -> BlockConfig:
    """A block draft without heads (DFlash)."""
    return BlockConfig(
        layers, taps, block, first_slot, mask, vocab, draft_vocab, "none", 0, False, False, causal_windows
    )
