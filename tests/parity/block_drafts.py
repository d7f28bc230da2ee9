"""A random block drafter in ONNX Runtime, passes of it, and the step-by-step reference's values for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dspark_export.bundle.weights import save_graphs
from dspark_export.drafts.graphs.block import export_block_drafter
from dspark_export.passes import all_forms, optimize
from dspark_export.passes.precision import PrecisionSettings, apply_precision
from dspark_runtime.backends.ort_graph import OrtGraphEngine, OrtGraphRunner
from dspark_runtime.bundle.contract import CacheLayer
from dspark_runtime.bundle.precisions import Weights
from tests.references.block_reference import Shape, draft
from tests.references.draft_samples import HIDDEN, KV_HEADS, TAPS, VOCAB, WIDTH, random_block

CAPACITY = 64
INNER = {"ctx_features", "block_hidden", "base_logits", "corrected_logits"}


@dataclass
class Exported:
    """A random draft, its graph in a session, and what the reference needs."""

    shape: Shape
    weights: dict[str, torch.Tensor]
    embedding: torch.Tensor
    head: torch.Tensor
    engine: OrtGraphEngine
    target_ids: torch.Tensor | None
    topk: int | None
    scale: float

    def open(self, batch: int) -> OrtGraphRunner:
        return self.engine.open(self.engine.allocate(batch, CAPACITY))

    def reference(
        self, features: torch.Tensor, anchor: int, temperature: float = 0.0, uniforms: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        head = self.head if self.target_ids is None else self.head[self.target_ids]
        return draft(
            self.shape,
            self.weights,
            self.embedding,
            head,
            features,
            anchor,
            temperature,
            uniforms,
            self.target_ids,
            self.scale,
            self.topk,
        )


def export(
    folder: Path,
    markov: str = "vanilla",
    family: str = "qwen3",
    *,
    variant: str = "onnxruntime-cpu",
    precision: Weights = "fp32",
    dtype: str = "float32",
    mask_weight: float = 1.0,
    draft_vocabulary: torch.Tensor | None = None,
    markov_topk: int | None = None,
    **sample: Any,
) -> Exported:
    checkpoint, shape = random_block(markov, family, **sample)
    kind, scale = getattr(torch, dtype), 7.0 if family == "gemma4" else 1.0
    random = torch.Generator().manual_seed(9)
    width = sample.get("hidden", HIDDEN)
    embedding, head = (torch.randn(VOCAB, width, generator=random) for _ in range(2))
    head[VOCAB - 1] *= mask_weight
    embedding, head = embedding.to(kind), head.to(kind)
    graph = export_block_drafter(
        checkpoint,
        embedding=embedding,
        head=head,
        name="draft",
        dtype=dtype,
        draft_vocabulary=draft_vocabulary,
        markov_topk=markov_topk,
        embedding_scale=scale,
    )
    optimize(graph)
    apply_precision(graph, PrecisionSettings(precision))
    forms = all_forms({"draft": graph}, 512, kernels=variant == "sequence-kernels")
    path = save_graphs({name: form for _, name, form in forms}, folder)[variant]
    cache = [CacheLayer(KV_HEADS, WIDTH, WIDTH)] * shape.layers
    return Exported(
        shape,
        {name: tensor.to(kind).float() for name, tensor in checkpoint.tensors.items()},
        embedding.float(),
        head.float(),
        OrtGraphEngine(path, name="draft", cache=cache, dtype=dtype if variant == "standard" else "float32"),
        draft_vocabulary,
        markov_topk,
        scale,
    )


def run(
    exported: Exported,
    runner: OrtGraphRunner,
    features: Sequence[torch.Tensor],
    starts: Sequence[int],
    anchors: Sequence[int],
    temperatures: Sequence[float] | None = None,
    uniforms: torch.Tensor | None = None,
) -> dict[str, np.ndarray]:
    """One pass of a ragged batch: sequence b has ``starts[b]`` rows in the cache and gets ``features[b]``."""
    batch, block, new = len(starts), exported.shape.block, max(map(len, features))
    drafts = block - exported.shape.first_slot
    kv_len = max(starts) + new + block
    inputs: dict[str, Any] = {
        "target_features": np.zeros((batch, new, features[0].shape[1]), np.float32),
        "feature_positions": np.zeros((batch, new), np.int64),
        "anchor_ids": np.array(anchors),
        "block_positions": np.zeros((batch, block), np.int64),
        "attention_mask": np.zeros((batch, 1, block, kv_len), np.bool_),
        "write_indices": np.array(starts),
        "temperature": np.array(temperatures or [0.0] * batch, np.float32),
        "uniforms": np.zeros((batch, drafts), np.float32) if uniforms is None else uniforms.numpy(),
    }
    for b, (start, rows) in enumerate(zip(starts, features, strict=True)):
        end = start + len(rows)
        inputs["target_features"][b, : len(rows)] = rows.numpy()
        inputs["feature_positions"][b] = np.arange(start, start + new)
        inputs["block_positions"][b] = np.arange(end, end + block)
        inputs["attention_mask"][b, 0, :, :end] = True
        inputs["attention_mask"][b, 0, :, start + new : start + new + block] = True
    runner.select(0, batch)
    return runner.run(inputs)


def check(found: dict[str, np.ndarray], expected: dict[str, torch.Tensor], row: int = 0, start: int = 0) -> None:
    """Every value of one sequence; rows of the context are those new in this pass."""
    count = len(expected["ctx_features"]) - start
    assert set(expected) - {"draft_probs"} >= INNER
    inner = found.keys() >= INNER
    for name, value in expected.items():
        if name == "draft_probs" or (not inner and (name in INNER or name.startswith("ctx_"))):
            continue
        wanted = value.numpy()[start:] if name.startswith("ctx_") else value.numpy()
        got = found[name][row, :count] if name.startswith("ctx_") else found[name][row]
        assert got.shape == wanted.shape, name
        tolerance = 1e-5 if name in ("confidence_logits", "candidate_probs", "beam_probs") else 1e-4
        np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerance if got.dtype.kind == "f" else 0, err_msg=name)


def context(*counts: int, seed: int = 5, hidden: int = HIDDEN) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(count, TAPS * hidden, generator=random) for count in counts]
