"""Compares a draft's copies of the target's embedding and head with the target's own, row by row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from dspark_export.checkpoints.safetensors_file import FLOAT_DTYPES
from dspark_export.checkpoints.weights import read_headers
from dspark_export.drafts.formats.description import EMBEDDING, HEAD
from dspark_export.drafts.formats.draft import BlockConfig, DraftCheckpoint
from dspark_export.drafts.formats.tensors import StoredTensors
from dspark_export.drafts.pair_check.report import Finding, passed
from dspark_runtime.errors import EmbeddingsMismatch

if TYPE_CHECKING:
    import torch

    from dspark_export.checkpoints import Checkpoint

OVERRIDE = "--allow-own-embeddings"
FULL_ELEMENTS = 2**25
"""Up to this many elements every row is compared; above it, :data:`SAMPLED_ROWS` evenly spaced rows."""

SAMPLED_ROWS = 4096
_TOLERANCE = 2.0**-8 * 1.01  # of the larger value: one rounding to bfloat16
_TINY = 6e-8  # one rounding to float16 where it is denormal
_EMBEDDINGS = (
    "embed_tokens.weight",
    "wte.weight",
    "embed_in.weight",
    "word_embeddings.weight",
    "tok_embeddings.weight",
)
_HEADS = ("lm_head.weight", "embed_out.weight", "output.weight")
_NAMES = {EMBEDDING: "embedding", HEAD: "head"}


def check_copies(target: Checkpoint, draft: DraftCheckpoint, allowed: bool, tokens: int | None) -> list[Finding]:
    """A finding for the embedding and one for the head; ``allowed``: a copy that differs is a warning.

    Rows from ``tokens`` on are padding.
    """
    own = {EMBEDDING: draft.own_embedding, HEAD: draft.own_head}
    findings = [
        passed(word, f"draft and model share the {word}", "the draft's own" if own[name] else "not stored, the model's")
        for name, word in _NAMES.items()
        if name not in draft.copies
    ]
    if not draft.copies or draft.config.layers.hidden_size != target.config.get_text_config().hidden_size:
        return findings
    live = live_tables(target)
    return findings + [_compare(draft, name, live, allowed, tokens) for name in sorted(draft.copies)]


def live_tables(target: Checkpoint) -> Mapping[str, torch.Tensor]:
    """The target's embedding and head under DeepSpec's names, read on request."""
    if target.weights is not None and not target.weights.pickled:
        config = target.config.get_text_config()
        table = (target.vocab_size, config.hidden_size)
        found = {
            name: path
            for name, (path, stored) in read_headers(target.weights, target.id).items()
            if stored.shape == table and stored.dtype in FLOAT_DTYPES
        }
        embeddings = [name for name in found if name.endswith(_EMBEDDINGS)]
        heads = [] if config.tie_word_embeddings else [name for name in found if name.endswith(_HEADS)]
        if len(embeddings) == 1 and (len(heads) == 1 or config.tie_word_embeddings):
            head = heads[0] if heads else embeddings[0]
            return StoredTensors({EMBEDDING: (found[embeddings[0]], embeddings[0]), HEAD: (found[head], head)})
    import torch

    model = target.load_model(torch.float32)
    return {EMBEDDING: model.get_input_embeddings().weight, HEAD: model.get_output_embeddings().weight}


def _rows(tables: Mapping[str, torch.Tensor], name: str, rows: torch.Tensor) -> torch.Tensor:
    found = tables.rows(name, rows) if isinstance(tables, StoredTensors) else tables[name][rows]
    return found.float()


def _count(tables: Mapping[str, torch.Tensor], name: str) -> int:
    return int(tables.shape(name)[0] if isinstance(tables, StoredTensors) else tables[name].shape[0])


def _compare(
    draft: DraftCheckpoint, name: str, live: Mapping[str, torch.Tensor], allowed: bool, tokens: int | None
) -> Finding:
    import torch

    word = _NAMES[name]
    asked = f"the {word} stored in the draft has to be the model's"
    stored, ours = _count(draft.copies, name), _count(live, name)
    ids = torch.arange(stored) if name == EMBEDDING or draft.target_ids is None else draft.target_ids
    mask = draft.config.mask_token_id if isinstance(draft.config, BlockConfig) else -1
    kept = ids < (ours if stored == ours else min(ours, tokens or ours))  # padding of another size means nothing
    step = 1
    if int(kept.sum()) * draft.config.layers.hidden_size > FULL_ELEMENTS:
        step = -(-int(kept.sum()) // SAMPLED_ROWS)
        kept &= torch.arange(stored) % step == 0
    rows = torch.nonzero(kept | ((ids == mask) & (ids < ours)))[:, 0]
    copy, own = _rows(draft.copies, name, rows), _ordered(live, name, ids[rows])
    distance = (copy - own).abs()
    bad = (distance > _TOLERANCE * torch.maximum(copy.abs(), own.abs()) + _TINY).any(-1)
    if not bool(bad.any()):
        how = f"all {len(rows)} rows" if step == 1 else f"{len(rows)} rows, every {step}th,"
        return passed(word, asked, f"{how} agree")
    wrong = ids[rows][bad].tolist()
    shown = ", ".join(map(str, wrong[:5])) + (", ..." if len(wrong) > 5 else "")
    found = f"{len(wrong)} of {len(rows)} compared rows differ (tokens {shown}), by up to {float(distance.max()):.3g}"
    if allowed:
        return Finding(word, "warning", asked, found, f"the draft's own is used, as {OVERRIDE} says")
    fix = f"use the model the draft was trained for, or pass {OVERRIDE} to give the draft its own"
    return Finding(word, "error", asked, found, fix, EmbeddingsMismatch)


def _ordered(live: Mapping[str, torch.Tensor], name: str, ids: torch.Tensor) -> torch.Tensor:
    """Rows ``ids`` of the target's table, in that order; maps of reduced vocabularies need not ascend."""
    import torch

    ascending, back = torch.unique(ids, return_inverse=True)
    return _rows(live, name, ascending)[back]
