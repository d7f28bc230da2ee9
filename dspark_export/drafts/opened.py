"""A draft on its way into a bundle: what was requested, what was opened, and what its export returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from dspark_export.checkpoints.trust import Trust
from dspark_runtime.bundle.contract import CacheLayer
from dspark_runtime.bundle.manifest import DrafterEntry, Source
from dspark_runtime.bundle.precisions import FloatType

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch
    from transformers import PreTrainedModel

    from dspark_export.checkpoints import Checkpoint
    from dspark_export.drafts.formats.draft import DraftCheckpoint, DraftLayers

_VOCABULARY_FOLDER = "drafts"


@dataclass(frozen=True)
class DraftSettings:
    """What a build says about its drafts.

    ``dtype``: what their graphs compute in. ``chains_only``: drafts must be chains, see docs/exactness.md.
    ``vocabulary``: file of the ids that may be drafted. ``markov_topk``: candidates of a slot that a Markov head
    corrects, None for all. ``allow_own_embeddings``: use embeddings of a draft that differ from the target's.
    """

    dtype: FloatType = "float32"
    chains_only: bool = False
    vocabulary: Path | None = None
    markov_topk: int | None = None
    allow_own_embeddings: bool = False
    trust: Trust = field(default_factory=Trust.closed)


@dataclass(frozen=True)
class OpenedDraft:
    """A draft that fits the target. ``name`` is what ``speculate`` calls it."""

    name: str
    checkpoint: DraftCheckpoint | Checkpoint

    @property
    def taps(self) -> tuple[int, ...]:
        """Target layers it reads; none for an independent draft model."""
        # torch: only where there are drafts
        from dspark_export.drafts.formats.draft import DraftCheckpoint

        return self.checkpoint.config.taps if isinstance(self.checkpoint, DraftCheckpoint) else ()


@dataclass(frozen=True)
class DraftGraphs:
    """What a draft adds to a bundle. ``target_ids``: int64 [draft vocab] for its ``vocab_map`` file, None for none."""

    graphs: dict[str, ir.Model]
    cache: tuple[CacheLayer, ...]
    entry: DrafterEntry
    target_ids: npt.NDArray[np.int64] | None = None


class TargetTables(NamedTuple):
    """The target's embedding and head, [vocab, hidden] each, and what it multiplies embeddings with."""

    embedding: torch.Tensor
    head: torch.Tensor
    embedding_scale: float

    @classmethod
    def of(cls, model: PreTrainedModel) -> TargetTables:
        """The live tables of ``model``."""
        # torch, transformers: only when a model is loaded
        from dspark_export.tracing.geometry import embedding_scale

        tables = (model.get_input_embeddings().weight, model.get_output_embeddings().weight)
        return cls(*tables, embedding_scale(model))

    def float(self) -> TargetTables:
        """The same in float32."""
        return self._replace(embedding=self.embedding.float(), head=self.head.float())


def cache_of(layers: DraftLayers) -> tuple[CacheLayer, ...]:
    """The cache of a draft's layers."""
    width = layers.head_dim
    return tuple(CacheLayer(layers.kv_heads, width, width, window) for window in layers.windows)


def source_of(checkpoint: DraftCheckpoint) -> Source:
    """Where a draft came from."""
    return Source(kind="local", id=checkpoint.directory.name, files=dict(checkpoint.files or {}))


def vocab_map(name: str, target_ids: torch.Tensor | None) -> str | None:
    """Path in the bundle of the map of a reduced vocabulary."""
    return None if target_ids is None else f"{_VOCABULARY_FOLDER}/{name}.vocab.npy"


def as_array(target_ids: torch.Tensor | None) -> npt.NDArray[np.int64] | None:
    """``target_ids`` as :class:`DraftGraphs` holds them."""
    return None if target_ids is None else target_ids.numpy().astype(np.int64)
