"""Graphs of block drafters in ONNX Runtime against the step-by-step reference, at every intermediate."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from dspark_export.graphs.block_drafter import export_block_drafter
from dspark_export.graphs.save import save_graphs
from dspark_export.passes import for_ort_cpu, optimize
from dspark_runtime.backends.ort_graph import OrtGraphEngine, OrtGraphRunner
from dspark_runtime.contract import CacheLayer
from tests.references.block_reference import Shape, draft
from tests.references.draft_samples import HIDDEN, KV_HEADS, TAPS, VOCAB, WIDTH, random_block

CAPACITY = 64
INNER = ("ctx_features", "block_hidden", "base_logits", "corrected_logits")


@dataclass
class Exported:
    """A random draft, its graph in a session, and what the reference needs."""

    shape: Shape
    weights: dict[str, torch.Tensor]
    embedding: torch.Tensor
    head: torch.Tensor
    engine: OrtGraphEngine
    target_ids: torch.Tensor | None = None

    def open(self, batch: int) -> OrtGraphRunner:
        return self.engine.open(self.engine.allocate(batch, CAPACITY))

    def reference(self, features: torch.Tensor, anchor: int, **options: object) -> dict[str, torch.Tensor]:
        head = self.head if self.target_ids is None else self.head[self.target_ids]
        return draft(
            self.shape, self.weights, self.embedding, head, features, anchor, target_ids=self.target_ids, **options
        )  # type: ignore[arg-type]


def export(folder: Path, markov: str, family: str, *, variant: bool = True, **options: object) -> Exported:
    vocabulary = options.pop("draft_vocabulary", None)
    checkpoint, shape = random_block(markov, family, **options)  # type: ignore[arg-type]
    random = torch.Generator().manual_seed(9)
    embedding, head = (torch.randn(VOCAB, HIDDEN, generator=random) for _ in range(2))
    graph = export_block_drafter(
        checkpoint,
        embedding=embedding,
        head=head,
        name="draft",
        dtype="float32",
        draft_vocabulary=vocabulary,  # type: ignore[arg-type]
    )
    optimize(graph)
    if variant:
        graph = for_ort_cpu(graph, 512, any_batch=True)
    path = save_graphs({"draft": graph}, folder)["draft"]
    layers = checkpoint.config.layers
    cache = [CacheLayer(KV_HEADS, WIDTH, WIDTH, shape.window)] * layers.count
    return Exported(
        shape, dict(checkpoint.tensors), embedding, head, OrtGraphEngine(path, name="draft", cache=cache), vocabulary
    )  # type: ignore[arg-type]


def run(
    exported: Exported,
    runner: OrtGraphRunner,
    features: list[torch.Tensor],
    starts: list[int],
    anchors: list[int],
    temperature: float = 0.0,
    uniforms: torch.Tensor | None = None,
) -> dict[str, np.ndarray]:
    """One pass of a ragged batch: sequence b has ``starts[b]`` rows in the cache and gets ``features[b]``."""
    batch, block, new = len(starts), exported.shape.block, max(map(len, features))
    drafts = block - exported.shape.first_slot
    kv_len = max(starts) + new + block
    inputs = {
        "target_features": np.zeros((batch, new, TAPS * HIDDEN), np.float32),
        "feature_positions": np.zeros((batch, new), np.int64),
        "anchor_ids": np.array(anchors),
        "block_positions": np.zeros((batch, block), np.int64),
        "attention_mask": np.zeros((batch, 1, block, kv_len), np.bool_),
        "write_indices": np.array(starts),
        "temperature": np.full(batch, temperature, np.float32),
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


def check(found: dict[str, np.ndarray], expected: dict[str, torch.Tensor], row: int, start: int) -> None:
    count = len(expected["ctx_features"]) - start
    for name, value in expected.items():
        if name == "draft_probs":
            continue
        wanted = value.numpy()[start:] if name.startswith("ctx_") else value.numpy()
        got = found[name][row, :count] if name.startswith("ctx_") else found[name][row]
        assert got.shape == wanted.shape, name
        tolerance = 1e-5 if name.startswith("confidence") else 1e-4
        np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerance if got.dtype.kind == "f" else 0, err_msg=name)


KINDS = [("vanilla", "qwen3"), ("gated", "qwen3"), ("rnn", "qwen3"), ("none", "qwen3"), ("vanilla", "gemma4")]


@pytest.mark.parametrize(("markov", "family"), KINDS)
def test_every_intermediate_and_a_second_round(markov: str, family: str, tmp_path: Path) -> None:
    """A ragged batch of two, then a round after a partial accept: features of accepted rows only."""
    exported = export(tmp_path, markov, family)
    random = torch.Generator().manual_seed(5)
    texts = [torch.randn(n, TAPS * HIDDEN, generator=random) for n in (14, 9)]
    runner, starts, counts = exported.open(2), [0, 0], [11, 5]
    for anchors, more in (([3, 8], [2, 1]), ([40, 7], [1, 3]), ([1, 2], [0, 0])):
        ends = [start + count for start, count in zip(starts, counts, strict=True)]
        parts = [text[start:end] for text, start, end in zip(texts, starts, ends, strict=True)]
        found = run(exported, runner, parts, starts, anchors)
        for row in range(2):
            expected = exported.reference(texts[row][: ends[row]], anchors[row])
            check(found, expected, row, starts[row])
        starts, counts = ends, more


@pytest.mark.parametrize(
    "options",
    [
        {"first_slot": 1, "block": 5, "confidence": False},
        {"window": 6},
        {"window": 6, "causal": True},
        {"draft_vocabulary": torch.arange(3, VOCAB, 2)},
    ],
    ids=["own-position slots", "window", "causal window", "draft vocabulary"],
)
def test_other_conventions(options: dict[str, object], tmp_path: Path) -> None:
    exported = export(tmp_path, "vanilla", "qwen3", **options)
    features = torch.randn(13, TAPS * HIDDEN, generator=torch.Generator().manual_seed(2))
    found = run(exported, exported.open(1), [features], [0], [21])
    check(found, exported.reference(features, 21), 0, 0)


@pytest.mark.parametrize("variant", [True, False], ids=["onnxruntime-cpu", "standard"])
def test_sampling_draws_from_the_distribution_it_returns(variant: bool, tmp_path: Path) -> None:
    exported = export(tmp_path, "vanilla", "qwen3", variant=variant)
    random = torch.Generator().manual_seed(11)
    features = torch.randn(9, TAPS * HIDDEN, generator=random)
    for _ in range(8):
        uniforms = torch.rand(1, exported.shape.block, generator=random)
        found = run(exported, exported.open(1), [features], [0], [21], 0.7, uniforms)
        expected = exported.reference(features, 21, temperature=0.7, uniforms=uniforms[0])
        check(found, expected, 0, 0)
        np.testing.assert_allclose(found["draft_probs"][0], expected["draft_probs"].numpy(), rtol=0, atol=1e-5)


def test_the_mask_token_is_never_drafted(tmp_path: Path) -> None:
    exported = export(tmp_path, "none", "qwen3")
    seen = 0
    for seed in range(40):
        features = torch.randn(9, TAPS * HIDDEN, generator=torch.Generator().manual_seed(seed))
        found = run(exported, exported.open(1), [features], [0], [seed])
        top = found["base_logits"].argmax(-1)
        assert VOCAB - 1 not in found["draft_tokens"] and VOCAB - 1 not in found["candidate_tokens"]
        assert ((found["draft_tokens"] == top) | (top == VOCAB - 1)).all()
        seen += int((top == VOCAB - 1).sum())
    assert seen  # it would have been the likeliest token somewhere
