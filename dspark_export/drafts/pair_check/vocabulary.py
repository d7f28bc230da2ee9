"""Checks vocabulary sizes, padding rows, the mask token and the map of a reduced vocabulary."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dspark_export.drafts.formats.draft import BlockConfig, DraftCheckpoint
from dspark_export.drafts.pair_check.report import Finding, passed
from dspark_runtime.errors import MaskTokenMismatch, VocabularyMismatch

if TYPE_CHECKING:
    from dspark_export.checkpoints import Checkpoint


def token_count(target: Checkpoint) -> int | None:
    """One more than the largest id of the target's tokenizer; None without one. Embedding rows after it are padding."""
    if target.tokenizer is None:
        return None
    return max(target.tokenizer.backend.get_vocab(with_added_tokens=True).values()) + 1


def check_sizes(target: Checkpoint, draft: DraftCheckpoint | Checkpoint) -> list[Finding]:
    """Equal sizes, or sizes that differ by rows no token has."""
    asked = "draft and model need vocabularies that differ by padding rows at most"
    ours, tokens = target.vocab_size, token_count(target)
    theirs = draft.config.vocab_size if isinstance(draft, DraftCheckpoint) else draft.vocab_size
    if ours == theirs:
        padding = f", of which {ours - tokens} are padding" if tokens is not None and tokens < ours else ""
        return [passed("vocabulary", asked, f"both have {ours} rows{padding}")]
    if tokens is None:
        found = (
            f"the model has {ours} rows, the draft {theirs}, and without the model's tokenizer nothing tells padding"
        )
        fix = "put the model's tokenizer files into its folder, or use a draft with its vocabulary"
        return [Finding("vocabulary", "error", asked, found, fix, VocabularyMismatch)]
    if tokens > min(ours, theirs):
        found = f"the model has {ours} rows for {tokens} tokens, the draft {theirs}"
        return [Finding("vocabulary", "error", asked, found, "use a draft trained for this model", VocabularyMismatch)]
    found = f"the model has {ours} rows, the draft {theirs}; from {tokens} on they are padding, which is never drafted"
    return [passed("vocabulary", asked, found)]


def check_map(target: Checkpoint, draft: DraftCheckpoint) -> list[Finding]:
    """Target ids of a reduced vocabulary."""
    if draft.target_ids is None:
        return []
    asked = "the draft's own tokens have to be tokens of the model"
    largest, tokens = int(draft.target_ids.max()), token_count(target)
    if largest >= target.vocab_size:
        found = f"its map leads to id {largest}, the model has {target.vocab_size} rows"
        fix = "use a draft trained for this model"
        return [Finding("vocab_map", "error", asked, found, fix, VocabularyMismatch)]
    if tokens is not None and largest >= tokens:
        count = int((draft.target_ids >= tokens).sum())
        found = f"{count} of them are rows after the model's {tokens} tokens; they cost time and are never right"
        return [Finding("vocab_map", "warning", asked, found)]
    if draft.odd_map:
        return [Finding("vocab_map", "warning", asked, draft.odd_map)]
    return [passed("vocab_map", asked, f"{len(draft.target_ids)} of {target.vocab_size}")]


def check_mask(target: Checkpoint, draft: DraftCheckpoint) -> list[Finding]:
    """The mask token of a block draft: a row of the embedding that no text of the target has."""
    config = draft.config
    if not isinstance(config, BlockConfig):
        return []
    asked = "the mask token has to be a row of the model's embedding that is not a token of its texts"
    mask, fix = config.mask_token_id, "use a draft trained for this model, or correct mask_token_id in its config.json"
    if mask >= target.vocab_size:
        found = f"mask_token_id {mask} is outside its {target.vocab_size} rows"
        return [Finding("mask_token", "error", asked, found, fix, MaskTokenMismatch)]
    if mask in target.eos_token_ids:
        found = f"mask_token_id {mask} ends the model's texts"
        return [Finding("mask_token", "error", asked, found, fix, MaskTokenMismatch)]
    if target.tokenizer is None:
        return [Finding("mask_token", "warning", asked, f"{mask} is a row; the model has no tokenizer to say what for")]
    text = target.tokenizer.backend.id_to_token(mask)
    reserved = target.tokenizer.backend.get_added_tokens_decoder()
    if text is not None and mask not in reserved:
        found = f"mask_token_id {mask} is the ordinary token {text!r}, which could never be drafted"
        return [Finding("mask_token", "error", asked, found, fix, MaskTokenMismatch)]
    return [passed("mask_token", asked, f"{mask} is {'unused' if text is None else f'the reserved token {text!r}'}")]
