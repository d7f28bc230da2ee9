"""Recognises the drafts of a build, checks them against the target, exports them and describes them in the manifest.

Each kind of draft has a file in :mod:`dspark_export.drafts.graphs`, which is chosen by the type of the draft's config.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from dspark_export.drafts.opened import DraftGraphs, DraftSettings, OpenedDraft, TargetTables

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch
    from transformers import PreTrainedModel

    from dspark_export.checkpoints import Checkpoint
    from dspark_export.drafts.formats.draft import DraftCheckpoint
    from dspark_runtime.bundle.contract import GraphContract
    from dspark_runtime.bundle.manifest import DrafterEntry


class DraftKind(Protocol):
    """What the file of a kind of draft has."""

    def default_name(self, checkpoint: DraftCheckpoint | Checkpoint) -> str:
        """What a drafter of this kind is called in a bundle."""

    def export(self, draft: OpenedDraft, target: PreTrainedModel, settings: DraftSettings) -> DraftGraphs:
        """Its graphs, and its entry in the manifest. Raises ExportError."""

    def modules(
        self,
        checkpoint: DraftCheckpoint,
        entry: DrafterEntry,
        tables: TargetTables,
        target_ids: torch.Tensor | None,
    ) -> list[tuple[torch.nn.Module, GraphContract]]:
        """What the graphs of ``entry`` were traced from, in float32; nothing for a separate model.

        ``target_ids``: what its ``vocab_map`` file holds.
        """


def kind_of(checkpoint: DraftCheckpoint | Checkpoint) -> DraftKind:
    """The file that exports ``checkpoint``."""
    # torch, onnx: only where there are drafts
    from dspark_export.drafts.formats.draft import BlockConfig, EagleConfig
    from dspark_export.drafts.graphs import block, draft_model, eagle3

    kinds: dict[type, DraftKind] = {BlockConfig: block, EagleConfig: eagle3}
    return kinds.get(type(checkpoint.config), draft_model)


def open_drafts(target: Checkpoint, drafts: Sequence[str], settings: DraftSettings) -> list[OpenedDraft]:
    """Recognise and check every ``--draft``; raises a CheckpointError for a draft that is damaged or does not fit."""
    # torch: only where there are drafts
    from dspark_export.drafts.formats import recognise
    from dspark_export.drafts.pair_check import require_pair

    opened: list[OpenedDraft] = []
    for draft in drafts:
        found = recognise(draft, trust=settings.trust)
        checkpoint = require_pair(target, found, allow_own_embeddings=settings.allow_own_embeddings)
        name = kind_of(checkpoint).default_name(checkpoint)
        opened.append(OpenedDraft(_free(name, {other.name for other in opened}), checkpoint))
    return opened


def _free(name: str, taken: set[str]) -> str:
    number, free = 2, name
    while free in taken:
        free, number = f"{name}-{number}", number + 1
    return free


def taps_of(drafts: Sequence[OpenedDraft]) -> tuple[int, ...]:
    """Target layers that any of the drafts reads, ascending."""
    return tuple(sorted({tap for draft in drafts for tap in draft.taps}))


def export_drafts(
    drafts: Sequence[OpenedDraft],
    target: PreTrainedModel,
    settings: DraftSettings,
    finish: Callable[[ir.Model], None],
) -> list[DraftGraphs]:
    """The graphs of all drafts; ``finish`` optimizes and quantizes one. Raises ExportError."""
    exported = []
    for draft in drafts:
        found = kind_of(draft.checkpoint).export(draft, target, settings)
        for graph in found.graphs.values():
            finish(graph)
        exported.append(found)
    return exported


def write_vocab_maps(exported: Sequence[DraftGraphs], folder: Path) -> None:
    """Write the target ids of reduced vocabularies where the manifest says they are."""
    for draft in exported:
        if draft.target_ids is not None and draft.entry.vocab_map is not None:
            path = folder / draft.entry.vocab_map
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, draft.target_ids)
