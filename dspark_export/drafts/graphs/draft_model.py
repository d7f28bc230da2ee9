"""An independent language model that drafts: a graph with the inputs and outputs of ``target``, under its own name, and
its entry in the manifest.

The graph has its own weights and cache and no ``hidden_taps``; see :mod:`dspark_export.graphs.target`.
"""

from __future__ import annotations

import onnx_ir as ir
import torch
from transformers import PreTrainedModel

from dspark_export.checkpoints import Checkpoint
from dspark_export.checkpoints.config import positions_of
from dspark_export.drafts.formats.draft import DraftCheckpoint
from dspark_export.drafts.opened import DraftGraphs, DraftSettings, OpenedDraft, TargetTables
from dspark_export.graphs.decoder import DecoderTrace
from dspark_export.tracing.geometry import probe
from dspark_runtime.bundle.contract import GraphContract, decoder_contract
from dspark_runtime.bundle.manifest import DrafterEntry


def default_name(checkpoint: DraftCheckpoint | Checkpoint) -> str:
    """What a drafter of this kind is called in a bundle."""
    return "draft-model"


def export(draft: OpenedDraft, target: PreTrainedModel, settings: DraftSettings) -> DraftGraphs:
    """The graph of the model, and its entry in the manifest. Raises ExportError."""
    checkpoint = draft.checkpoint
    assert isinstance(checkpoint, Checkpoint)
    model = checkpoint.load_model(getattr(torch, settings.dtype))
    entry = DrafterEntry(
        name=draft.name,
        kind="draft_model",
        graph=draft.name,
        max_positions=positions_of(model.config),
        source=checkpoint.source(),
    )
    return DraftGraphs({draft.name: export_draft_model(model, name=draft.name)}, tuple(probe(model.config)), entry)


def modules(
    checkpoint: DraftCheckpoint, entry: DrafterEntry, tables: TargetTables, target_ids: torch.Tensor | None
) -> list[tuple[torch.nn.Module, GraphContract]]:
    """None: the model itself is compared."""
    return []


def export_draft_model(source: PreTrainedModel | DecoderTrace, *, name: str) -> ir.Model:
    """The graph of a model (or of its trace), called ``name``; weights are referenced.

    Raises:
        UnsupportedArchitecture: the model's attention or cache does not fit the contract.
        ExportError: torch cannot trace the model.
    """
    trace = DecoderTrace.of(source)
    contract = decoder_contract(name, trace.cache, trace.vocab_size, trace.dtype)
    return trace.cut(contract, tuple(range(len(trace.cache))))
