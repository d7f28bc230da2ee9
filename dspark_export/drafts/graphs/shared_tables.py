"""Embedding and head of a drafter's graph: the target's live tensors wherever possible."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from dspark_export.drafts.formats.draft import DraftCheckpoint


def shared_tables(
    checkpoint: DraftCheckpoint,
    weights: Mapping[str, torch.Tensor],
    embedding: torch.Tensor,
    head: torch.Tensor,
    target_ids: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(embedding [vocab, hidden], head [draft vocab, hidden]) that the graph of ``checkpoint`` reads.

    They are ``embedding`` and ``head`` of the target themselves, so that a weight file holds them once, except: the
    draft has its own, or a reduced vocabulary takes some rows of the head. Where the target ties the two, one object
    is returned twice: the graph then reads one weight, in the layout that the target's graph stores.
    """
    tied = head is embedding or (head.data_ptr(), head.shape) == (embedding.data_ptr(), embedding.shape)
    if checkpoint.own_embedding:
        embedding, tied = weights["embed_tokens.weight"], False
    if checkpoint.own_head:
        head, tied = weights["lm_head.weight"], False
    if target_ids is not None and len(head) != len(target_ids):
        head, tied = head[target_ids], False
    return embedding, embedding if tied else head
