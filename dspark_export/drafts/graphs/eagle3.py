"""The two graphs of an EAGLE-3 drafter; their contract stands in :mod:`dspark_runtime.bundle.draft_contract`."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
import torch

from dspark_export.drafts.formats.draft import DraftCheckpoint, EagleConfig
from dspark_export.drafts.graphs.shared_tables import shared_tables
from dspark_export.drafts.modules.eagle import EagleModule
from dspark_export.tracing.example import example_inputs
from dspark_export.tracing.to_onnx import trace
from dspark_runtime.bundle.contract import CacheLayer, GraphContract
from dspark_runtime.bundle.draft_contract import EXTEND, STEP, eagle_contract


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
    config = checkpoint.config
    assert isinstance(config, EagleConfig)
    kind: torch.dtype = getattr(torch, dtype)
    weights = {key: tensor.to(kind) for key, tensor in checkpoint.tensors.items()}
    embedding, head = shared_tables(checkpoint, weights, embedding, head, checkpoint.target_ids)
    layers = config.layers
    cache = [CacheLayer(layers.kv_heads, layers.head_dim, layers.head_dim, layers.windows[0])]
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
