"""A block drafter (DSpark, DFlash): its graph, whose contract is in :mod:`dspark_runtime.bundle.draft_contract`,
and its entry in the manifest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import onnx_ir as ir
import torch
from transformers import PreTrainedModel

from dspark_export.checkpoints import Checkpoint
from dspark_export.drafts.extras import read_draft_vocab, stored_temperatures, stored_vocabulary
from dspark_export.drafts.formats.draft import BlockConfig, DraftCheckpoint
from dspark_export.drafts.graphs.shared_tables import shared_tables
from dspark_export.drafts.modules.beams import BEAMS, CANDIDATES, node_count
from dspark_export.drafts.modules.block import BlockModule
from dspark_export.drafts.opened import (
    DraftGraphs,
    DraftSettings,
    OpenedDraft,
    TargetTables,
    as_array,
    cache_of,
    source_of,
    vocab_map,
)
from dspark_export.passes import match
from dspark_export.tracing.to_onnx import trace
from dspark_runtime.bundle.contract import ATTENTION_MASK, WRITE_INDICES, GraphContract, TensorSpec
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
from dspark_runtime.bundle.manifest import BlockFacts, DrafterEntry
from dspark_runtime.errors import UsageError

_SIZES = {"batch": 2, "features": 3, "kv_len": 29, "capacity": 37}


def default_name(checkpoint: DraftCheckpoint | Checkpoint) -> str:
    """What a drafter of this kind is called in a bundle: by whether it has heads."""
    config = _config(checkpoint)
    return "dspark" if config.markov != "none" or config.confidence else "dflash"


def export(draft: OpenedDraft, target: PreTrainedModel, settings: DraftSettings) -> DraftGraphs:
    """The graph of a block drafter, and its entry in the manifest.

    Raises:
        UsageError: a vocabulary is given and the draft already has one, or one of the settings does not fit it.
        ExportError: torch cannot trace the draft.
    """
    checkpoint = draft.checkpoint
    assert isinstance(checkpoint, DraftCheckpoint)
    config = _config(checkpoint)
    chosen = _vocabulary(checkpoint, config, settings)
    vocab = config.draft_vocab_size if chosen is None else len(chosen)
    beams = 0 if settings.chains_only else BEAMS  # the graph need not compute what is not verified
    candidates = 1 if settings.chains_only else min(CANDIDATES, vocab, settings.markov_topk or vocab)
    graph = export_block_drafter(
        checkpoint,
        name=draft.name,
        dtype=settings.dtype,
        candidates=candidates,
        beams=beams,
        draft_vocabulary=chosen,
        markov_topk=settings.markov_topk,
        **TargetTables.of(target)._asdict(),
    )
    facts = BlockFacts(
        taps=config.taps,
        block=config.block,
        drafts=config.drafts,
        mask_token_id=config.mask_token_id,
        candidates=candidates,
        beams=beams,
        confidence=config.confidence,
        vocab_map=vocab_map(draft.name, chosen),
        confidence_temperatures=stored_temperatures(checkpoint.directory, config.drafts) if config.confidence else None,
    )
    entry = DrafterEntry(
        name=draft.name,
        kind="block",
        graph=draft.name,
        max_positions=config.layers.max_positions,
        block=facts,
        source=source_of(checkpoint),
    )
    return DraftGraphs({draft.name: graph}, cache_of(config.layers), entry, as_array(chosen))


def modules(
    checkpoint: DraftCheckpoint, entry: DrafterEntry, tables: TargetTables, target_ids: torch.Tensor | None
) -> list[tuple[torch.nn.Module, GraphContract]]:
    """See :class:`dspark_export.drafts.export.DraftKind`."""
    assert entry.block is not None
    made = block_module(
        checkpoint,
        name=entry.name,
        dtype="float32",
        candidates=entry.block.candidates,
        beams=entry.block.beams,
        draft_vocabulary=None if checkpoint.target_ids is not None else target_ids,
        **tables._asdict(),
    )
    return [made]


def _config(checkpoint: DraftCheckpoint | Checkpoint) -> BlockConfig:
    assert isinstance(checkpoint.config, BlockConfig)  # which is what this file was chosen by
    return checkpoint.config


def _vocabulary(checkpoint: DraftCheckpoint, config: BlockConfig, settings: DraftSettings) -> torch.Tensor | None:
    """The target's ids that may be drafted, None for all: the draft's own, or those that were requested."""
    own = checkpoint.target_ids
    if settings.vocabulary is None:
        return stored_vocabulary(checkpoint.directory, config.vocab_size) if own is None else own
    if own is not None:
        raise UsageError(
            f"--draft-vocab restricts the vocabulary of a draft, but {checkpoint.id} has its own of {len(own)}"
        )
    return read_draft_vocab(settings.vocabulary, config.vocab_size)


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
    """The graph of ``checkpoint``, with inner values as further outputs, see :mod:`dspark_export.passes.inner_values`.

    Args:
        embedding: the target's, [vocab, hidden]; referenced, not copied.
        head: the target's, [vocab, hidden]; referenced, or rows of it copied for a reduced vocabulary.
        name: of the graph.
        dtype: what it computes in, ``float32``, ``float16`` or ``bfloat16``.
        candidates: most likely tokens returned per slot, and per text that is followed.
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
    graph = trace(module, contract, example_inputs(contract))
    if markov_topk is None:
        graph.metadata_props[match.DRAFTS] = _config(checkpoint).markov
    return graph


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
    config = _config(checkpoint)
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
    contract = block_contract(
        name,
        cache_of(config.layers),
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


def example_inputs(contract: GraphContract) -> Sequence[torch.Tensor]:
    """One tensor for each input of a block contract; every symbolic dim has a different size."""
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
