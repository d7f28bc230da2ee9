"""The graph of a block drafter (DSpark, DFlash); its contract stands in :mod:`dspark_runtime.bundle.draft_contract`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import onnx_ir as ir
import torch

from dspark_export.drafts.formats.draft import BlockConfig, DraftCheckpoint
from dspark_export.drafts.graphs.shared_tables import shared_tables
from dspark_export.drafts.modules.beams import node_count
from dspark_export.drafts.modules.block import BlockModule
from dspark_export.tracing.to_onnx import trace
from dspark_runtime.bundle.contract import ATTENTION_MASK, WRITE_INDICES, CacheLayer, GraphContract, TensorSpec
from dspark_runtime.bundle.draft_contract import (
    BASE_LOGITS,
    BLOCK_HIDDEN,
    BLOCK_POSITIONS,
    CORRECTED_LOGITS,
    CTX_FEATURES,
    FEATURE_POSITIONS,
    TEMPERATURE,
    block_contract,
)
from dspark_runtime.errors import UsageError

_SIZES = {"batch": 2, "features": 3, "kv_len": 29, "capacity": 37}


def export_block_drafter(
    checkpoint: DraftCheckpoint,
    *,
    embedding: torch.Tensor,
    head: torch.Tensor,
    name: str,
    dtype: str,
    candidates: int = 4,
    beams: int = 4,
    draft_vocabulary: torch.Tensor | None = None,
    markov_topk: int | None = None,
    embedding_scale: float = 1.0,
) -> ir.Model:
    """The graph of ``checkpoint``, with its inner values as further outputs (see :func:`hide_inner_values`).

    Args:
        embedding: the target's, [vocab, hidden]; referenced, not copied.
        head: the target's, [vocab, hidden]; referenced, or rows of it copied for a reduced vocabulary.
        name: of the graph.
        dtype: what it computes in, ``float32``, ``float16`` or ``bfloat16``.
        candidates: likeliest tokens returned per slot, and per text that is followed.
        beams: texts of the block that are followed from slot to slot, at most ``candidates``; 0 for the chain alone.
        draft_vocabulary: int64, ascending: the target's ids that may be drafted; None for all.
        markov_topk: candidates per slot the Markov head corrects, the only tokens that can be drafted then; None for
            all. Without effect on a draft that has no Markov head.
        embedding_scale: what the target multiplies embeddings with.

    Raises:
        UsageError: ``markov_topk`` is below ``candidates``.
        ExportError: torch cannot trace the draft.
    """
    module, contract = block_module(
        checkpoint,
        embedding=embedding,
        head=head,
        name=name,
        dtype=dtype,
        candidates=candidates,
        beams=beams,
        draft_vocabulary=draft_vocabulary,
        markov_topk=markov_topk,
        embedding_scale=embedding_scale,
    )
    return trace(module, contract, example_inputs(contract))


def block_module(
    checkpoint: DraftCheckpoint,
    *,
    embedding: torch.Tensor,
    head: torch.Tensor,
    name: str,
    dtype: str,
    candidates: int = 4,
    beams: int = 4,
    draft_vocabulary: torch.Tensor | None = None,
    markov_topk: int | None = None,
    embedding_scale: float = 1.0,
) -> tuple[BlockModule, GraphContract]:
    """The module that is traced, and the contract of its inputs and outputs, inner values included."""
    config = checkpoint.config
    assert isinstance(config, BlockConfig)
    kind: torch.dtype = getattr(torch, dtype)
    ids = checkpoint.target_ids if draft_vocabulary is None else draft_vocabulary
    weights = {key: tensor.to(kind) for key, tensor in checkpoint.tensors.items()}
    embedding, head = shared_tables(checkpoint, weights, embedding, head, ids)
    if markov_topk is not None and markov_topk < candidates:
        raise UsageError(f"markov_topk={markov_topk}: a slot has {candidates} candidates; give at least as many")
    module = BlockModule(
        config,
        weights,
        embedding=embedding,
        head=head,
        target_ids=ids,
        candidates=candidates,
        beams=beams,
        markov_topk=markov_topk,
        embedding_scale=embedding_scale,
    ).eval()
    cache = [
        CacheLayer(config.layers.kv_heads, config.layers.head_dim, config.layers.head_dim, window)
        for window in config.layers.windows
    ]
    contract = block_contract(
        name,
        cache,
        dtype,
        features_width=len(config.taps) * config.layers.hidden_size,
        block=config.block,
        drafts=config.drafts,
        draft_vocab=len(head),
        candidates=candidates,
        nodes=node_count(config.drafts, beams, candidates) if beams else 0,
        confidence=config.confidence,
    )
    return module, replace(contract, outputs=(*contract.outputs, *inner_outputs(config, dtype, len(head))))


def inner_outputs(config: BlockConfig, dtype: str, draft_vocab: int) -> list[TensorSpec]:
    """Intermediates of the graph that keep their names, for tracing a draft."""
    layers, hidden = config.layers, config.layers.hidden_size
    specs = [
        TensorSpec(CTX_FEATURES, dtype, ("batch", "features", hidden)),
        TensorSpec(BLOCK_HIDDEN, dtype, ("batch", config.drafts, hidden)),
        TensorSpec(BASE_LOGITS, "float32", ("batch", config.drafts, draft_vocab)),
        TensorSpec(CORRECTED_LOGITS, "float32", ("batch", config.drafts, draft_vocab)),
    ]
    for i in range(layers.count):
        shape = ("batch", "features", layers.kv_heads, layers.head_dim)
        specs += [TensorSpec(f"ctx_keys.{i}", dtype, shape), TensorSpec(f"ctx_values.{i}", dtype, shape)]
    return specs


def hide_inner_values(model: ir.Model) -> ir.Model:
    """Make the inner values plain values again, under their names; returns ``model``. Nothing else changes."""
    inner = (CTX_FEATURES, BLOCK_HIDDEN, BASE_LOGITS, CORRECTED_LOGITS, "ctx_keys.", "ctx_values.")
    model.graph.outputs[:] = [value for value in model.graph.outputs if not (value.name or "").startswith(inner)]
    return model


def example_inputs(contract: GraphContract) -> Sequence[torch.Tensor]:
    """One tensor for each input of a block contract; every symbolic dim has a size of its own."""
    made = []
    for spec in contract.inputs:
        shape = [_SIZES[dim] if isinstance(dim, str) else dim for dim in spec.shape]
        dtype = getattr(torch, spec.dtype)
        tensor = torch.zeros(shape, dtype=dtype)
        if spec.name == WRITE_INDICES:
            tensor = torch.tensor([7, 11])
        elif spec.name == ATTENTION_MASK:
            tensor = torch.ones(shape, dtype=torch.bool)
        elif spec.name == TEMPERATURE:
            tensor = torch.tensor([0.0, 0.7])
        elif spec.name in (FEATURE_POSITIONS, BLOCK_POSITIONS):
            tensor = torch.arange(shape[1]).repeat(shape[0], 1)
        made.append(tensor)
    return made
