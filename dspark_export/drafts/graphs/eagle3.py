"""An EAGLE-3 drafter: its two graphs, whose contract is in :mod:`dspark_runtime.bundle.draft_contract`, and its
entry in the manifest."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
import torch
from transformers import PreTrainedModel

from dspark_export.checkpoints import Checkpoint
from dspark_export.drafts.formats.draft import DraftCheckpoint, EagleConfig
from dspark_export.drafts.graphs.shared_tables import shared_tables
from dspark_export.drafts.modules.eagle import EagleModule
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
from dspark_export.tracing.example import example_inputs
from dspark_export.tracing.to_onnx import trace
from dspark_runtime.bundle.contract import GraphContract
from dspark_runtime.bundle.draft_contract import EXTEND, STEP, eagle_contract
from dspark_runtime.bundle.manifest import DrafterEntry, EagleFacts


def default_name(checkpoint: DraftCheckpoint | Checkpoint) -> str:
    """What a drafter of this kind is called in a bundle."""
    return "eagle3"


def export(draft: OpenedDraft, target: PreTrainedModel, settings: DraftSettings) -> DraftGraphs:
    """The graphs of an EAGLE-3 drafter, and its entry in the manifest. Raises ExportError."""
    checkpoint = draft.checkpoint
    assert isinstance(checkpoint, DraftCheckpoint)
    config, ids = _config(checkpoint), checkpoint.target_ids
    graphs = export_eagle3(checkpoint, name=draft.name, dtype=settings.dtype, **TargetTables.of(target)._asdict())
    entry = DrafterEntry(
        name=draft.name,
        kind="eagle3",
        graph=f"{draft.name}{EXTEND}",
        max_positions=config.layers.max_positions,
        eagle3=EagleFacts(taps=config.taps, steps=config.steps, vocab_map=vocab_map(draft.name, ids)),
        source=source_of(checkpoint),
    )
    return DraftGraphs(graphs, cache_of(config.layers), entry, as_array(ids))


def modules(
    checkpoint: DraftCheckpoint, entry: DrafterEntry, tables: TargetTables, target_ids: torch.Tensor | None
) -> list[tuple[torch.nn.Module, GraphContract]]:
    """See :class:`dspark_export.drafts.export.DraftKind`."""
    return [*eagle_modules(checkpoint, name=entry.name, dtype="float32", **tables._asdict())]


def _config(checkpoint: DraftCheckpoint) -> EagleConfig:
    assert isinstance(checkpoint.config, EagleConfig)  # which is what this file was chosen by
    return checkpoint.config


def export_eagle3(
    checkpoint: DraftCheckpoint,
    *,
    embedding: torch.Tensor,
    head: torch.Tensor,
    name: str,
    dtype: str,
    embedding_scale: float = 1.0,
) -> dict[str, ir.Model]:
    """``<name>-extend`` and ``<name>-step``; they share every weight but the projection of the features.

    Args:
        embedding: the target's, [vocab, hidden]; referenced, not copied, unless the draft has its own.
        head: the target's, [vocab, hidden]; referenced, or rows of it copied for a reduced vocabulary without a head.
        name: of the drafter.
        dtype: what it computes in, ``float32``, ``float16`` or ``bfloat16``.
        embedding_scale: what the target multiplies embeddings with.

    Raises:
        ExportError: torch cannot trace the draft.
    """
    modules = eagle_modules(
        checkpoint, embedding=embedding, head=head, name=name, dtype=dtype, embedding_scale=embedding_scale
    )
    return {contract.name: trace(module, contract, _examples(contract)) for module, contract in modules}


def eagle_modules(
    checkpoint: DraftCheckpoint,
    *,
    embedding: torch.Tensor,
    head: torch.Tensor,
    name: str,
    dtype: str,
    embedding_scale: float = 1.0,
) -> list[tuple[EagleModule, GraphContract]]:
    """The modules that are traced, extend and step, each with its contract."""
    config = _config(checkpoint)
    kind: torch.dtype = getattr(torch, dtype)
    weights = {key: tensor.to(kind) for key, tensor in checkpoint.tensors.items()}
    embedding, head = shared_tables(checkpoint, weights, embedding, head, checkpoint.target_ids)
    layers = config.layers
    cache = cache_of(layers)[:1]
    made = []
    for suffix, width in ((EXTEND, len(config.taps) * layers.hidden_size), (STEP, None)):
        module = EagleModule(
            config,
            weights,
            embedding=embedding,
            head=head,
            features=width is not None,
            embedding_scale=embedding_scale,
        )
        contract = eagle_contract(
            f"{name}{suffix}",
            cache,
            dtype,
            hidden_size=layers.hidden_size,
            draft_vocab=len(head),
            features_width=width,
        )
        made.append((module.eval(), contract))
    return made


def _examples(contract: GraphContract) -> Sequence[torch.Tensor]:
    made = example_inputs(contract)
    made[0] = torch.zeros_like(made[0])  # ids that a small vocabulary has too
    return made
