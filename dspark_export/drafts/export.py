"""Drafts of a build: recognised, checked against the target, exported beside it, described in the manifest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dspark_runtime.bundle.contract import CacheLayer
from dspark_runtime.bundle.draft_contract import EXTEND
from dspark_runtime.bundle.manifest import BlockFacts, DrafterEntry, EagleFacts, Source
from dspark_runtime.errors import UsageError

if TYPE_CHECKING:
    import onnx_ir as ir
    from transformers import PreTrainedModel

    from dspark_export.build.options import BuildOptions
    from dspark_export.checkpoints import Checkpoint
    from dspark_export.drafts.formats.draft import DraftCheckpoint, DraftLayers

CANDIDATES = 8
"""Likeliest tokens a block drafter gives per slot, and per text of the block it follows: what trees are made from."""
BEAMS = 4
"""Texts of a block that are followed from slot to slot. With SmolLM2's drafter, trees of 24 drafts from 4 texts of 8
candidates have the accepted length of those from 8 of 8; from 4 of 4 they lose 0.04, from the chain alone 0.15."""

VOCABULARY_FOLDER = "drafts"


@dataclass(frozen=True)
class OpenedDraft:
    """A draft that fits the target. ``name`` is what ``speculate`` calls it."""

    name: str
    checkpoint: DraftCheckpoint | Checkpoint

    @property
    def taps(self) -> tuple[int, ...]:
        """Target layers it reads; none for an independent draft model."""
        from dspark_export.drafts.formats.draft import DraftCheckpoint

        return self.checkpoint.config.taps if isinstance(self.checkpoint, DraftCheckpoint) else ()


@dataclass(frozen=True)
class DraftGraphs:
    """What a draft adds to a bundle. ``target_ids``: int64 [draft vocab] for its ``vocab_map`` file, None for none."""

    graphs: dict[str, ir.Model]
    cache: tuple[CacheLayer, ...]
    entry: DrafterEntry
    target_ids: npt.NDArray[np.int64] | None = field(default=None)


def open_drafts(target: Checkpoint, options: BuildOptions) -> list[OpenedDraft]:
    """Recognise and check every ``--draft``; raises a CheckpointError for a draft that is damaged or does not fit."""
    from dspark_export.drafts.formats import recognise
    from dspark_export.drafts.pair_check import require_pair

    opened: list[OpenedDraft] = []
    for draft in options.drafts:
        found = recognise(draft, trust=options.trust)
        checkpoint = require_pair(target, found, allow_own_embeddings=options.allow_own_embeddings)
        opened.append(OpenedDraft(_free_name(checkpoint, {other.name for other in opened}), checkpoint))
    return opened


def taps_of(drafts: Sequence[OpenedDraft]) -> tuple[int, ...]:
    """Target layers that any of the drafts reads, ascending."""
    return tuple(sorted({tap for draft in drafts for tap in draft.taps}))


def export_drafts(
    drafts: Sequence[OpenedDraft], model: PreTrainedModel, options: BuildOptions, finish: Callable[[ir.Model], None]
) -> list[DraftGraphs]:
    """The graphs of all drafts; ``finish`` optimizes and quantizes one. Raises ExportError."""
    exported = []
    for draft in drafts:
        from dspark_export.drafts.formats.draft import BlockConfig, DraftCheckpoint

        if not isinstance(draft.checkpoint, DraftCheckpoint):
            found = _draft_model(draft, draft.checkpoint, options)
        elif isinstance(draft.checkpoint.config, BlockConfig):
            found = _block(draft, draft.checkpoint, model, options)
        else:
            found = _eagle(draft, draft.checkpoint, model, options)
        for graph in found.graphs.values():
            finish(graph)
        exported.append(found)
    return exported


def write_vocab_maps(exported: Sequence[DraftGraphs], folder: Path) -> None:
    """Write the target ids of reduced vocabularies where the manifest says they are."""
    for draft in exported:
        facts = draft.entry.block or draft.entry.eagle3
        if draft.target_ids is not None and facts is not None and facts.vocab_map is not None:
            path = folder / facts.vocab_map
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, draft.target_ids)


def _free_name(checkpoint: DraftCheckpoint | Checkpoint, taken: set[str]) -> str:
    from dspark_export.drafts.formats.draft import BlockConfig, DraftCheckpoint

    if not isinstance(checkpoint, DraftCheckpoint):
        name = "draft-model"
    elif isinstance(checkpoint.config, BlockConfig):
        name = "dspark" if checkpoint.config.markov != "none" or checkpoint.config.confidence else "dflash"
    else:
        name = "eagle3"
    number = 2
    free = name
    while free in taken:
        free = f"{name}-{number}"
        number += 1
    return free


def _block(
    draft: OpenedDraft, checkpoint: DraftCheckpoint, model: PreTrainedModel, options: BuildOptions
) -> DraftGraphs:
    from dspark_export.drafts.formats.draft import BlockConfig
    from dspark_export.drafts.graphs.block import export_block_drafter
    from dspark_export.train.saving import stored_temperatures, stored_vocabulary

    config = checkpoint.config
    assert isinstance(config, BlockConfig)
    chosen = checkpoint.target_ids
    if chosen is None and options.draft_vocab is None:
        chosen = stored_vocabulary(checkpoint.directory, config.vocab_size)
    if options.draft_vocab is not None:
        if chosen is not None:
            raise UsageError(
                f"--draft-vocab restricts the vocabulary of a draft, but {checkpoint.id} has its own of {len(chosen)}"
            )
        from dspark_export.drafts.extras import read_draft_vocab

        chosen = read_draft_vocab(options.draft_vocab, config.vocab_size)
    vocab = config.draft_vocab_size if chosen is None else len(chosen)
    beams = 0 if options.chains_only else BEAMS  # what is not verified is not asked of the graph either
    candidates = 1 if options.chains_only else min(CANDIDATES, vocab, options.markov_topk or vocab)
    graph = export_block_drafter(
        checkpoint,
        embedding=model.get_input_embeddings().weight,
        head=model.get_output_embeddings().weight,
        name=draft.name,
        dtype=options.dtype,
        candidates=candidates,
        beams=beams,
        draft_vocabulary=chosen,
        markov_topk=options.markov_topk,
        embedding_scale=embedding_scale(model),
    )
    facts = BlockFacts(
        taps=config.taps,
        block=config.block,
        drafts=config.drafts,
        mask_token_id=config.mask_token_id,
        candidates=candidates,
        beams=beams,
        confidence=config.confidence,
        vocab_map=None if chosen is None else f"{VOCABULARY_FOLDER}/{draft.name}.vocab.npy",
        confidence_temperatures=stored_temperatures(checkpoint.directory, config.drafts) if config.confidence else None,
    )
    return DraftGraphs(
        {draft.name: graph},
        _cache(config.layers),
        DrafterEntry(
            name=draft.name,
            kind="block",
            graph=draft.name,
            max_positions=config.layers.max_positions,
            block=facts,
            source=_source(checkpoint),
        ),
        None if chosen is None else chosen.numpy().astype(np.int64),
    )


def _eagle(
    draft: OpenedDraft, checkpoint: DraftCheckpoint, model: PreTrainedModel, options: BuildOptions
) -> DraftGraphs:
    from dspark_export.drafts.formats.draft import EagleConfig
    from dspark_export.drafts.graphs.eagle3 import export_eagle3

    config = checkpoint.config
    assert isinstance(config, EagleConfig)
    graphs = export_eagle3(
        checkpoint,
        embedding=model.get_input_embeddings().weight,
        head=model.get_output_embeddings().weight,
        name=draft.name,
        dtype=options.dtype,
        embedding_scale=embedding_scale(model),
    )
    ids = checkpoint.target_ids
    facts = EagleFacts(
        taps=config.taps,
        steps=config.steps,
        vocab_map=None if ids is None else f"{VOCABULARY_FOLDER}/{draft.name}.vocab.npy",
    )
    return DraftGraphs(
        graphs,
        _cache(config.layers),
        DrafterEntry(
            name=draft.name,
            kind="eagle3",
            graph=f"{draft.name}{EXTEND}",
            max_positions=config.layers.max_positions,
            eagle3=facts,
            source=_source(checkpoint),
        ),
        None if ids is None else ids.numpy().astype(np.int64),
    )


def _draft_model(draft: OpenedDraft, checkpoint: Checkpoint, options: BuildOptions) -> DraftGraphs:
    import torch

    from dspark_export.drafts.graphs.draft_model import export_draft_model
    from dspark_export.tracing.geometry import probe

    model = checkpoint.load_model(getattr(torch, options.dtype))
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return DraftGraphs(
        {draft.name: export_draft_model(model, name=draft.name)},
        tuple(probe(model.config)),
        DrafterEntry(
            name=draft.name,
            kind="draft_model",
            graph=draft.name,
            max_positions=positions,
            source=checkpoint.source(),
        ),
    )


def _cache(layers: DraftLayers) -> tuple[CacheLayer, ...]:
    width = layers.head_dim
    return tuple(CacheLayer(layers.kv_heads, width, width, layers.windows[i]) for i in range(layers.count))


def _source(checkpoint: DraftCheckpoint) -> Source:
    return Source(kind="local", id=checkpoint.directory.name, files=dict(checkpoint.files or {}))


def embedding_scale(model: PreTrainedModel) -> float:
    """What the model multiplies its embeddings with (Gemma), 1 for most."""
    scale = getattr(model.get_input_embeddings(), "embed_scale", None)
    return 1.0 if scale is None else float(scale)
