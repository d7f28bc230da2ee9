"""Graphs of block drafters in ONNX Runtime against the step-by-step reference, at every intermediate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from dspark_export.bundle.weights import save_graphs
from dspark_export.drafts.graphs.block import export_block_drafter, hide_inner_values
from dspark_export.passes import optimize, ort_cpu_variants
from dspark_runtime.backends.ort_graph import OrtGraphEngine, OrtGraphRunner
from dspark_runtime.bundle.contract import CacheLayer
from dspark_runtime.errors import UsageError
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
    dtype: str = "float32",
    mask_weight: float = 1.0,
    draft_vocabulary: torch.Tensor | None = None,
    markov_topk: int | None = None,
    **sample: Any,
) -> Exported:
    checkpoint, shape = random_block(markov, family, **sample)
    kind, scale = getattr(torch, dtype), 7.0 if family == "gemma4" else 1.0
    random = torch.Generator().manual_seed(9)
    embedding, head = (torch.randn(VOCAB, HIDDEN, generator=random) for _ in range(2))
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
    if variant != "standard":
        graph = ort_cpu_variants(graph, 512)[variant]
    path = save_graphs({"draft": graph}, folder)["draft"]
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
        "target_features": np.zeros((batch, new, TAPS * HIDDEN), np.float32),
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
    for name, value in expected.items():
        if name == "draft_probs":
            continue
        wanted = value.numpy()[start:] if name.startswith("ctx_") else value.numpy()
        got = found[name][row, :count] if name.startswith("ctx_") else found[name][row]
        assert got.shape == wanted.shape, name
        tolerance = 1e-5 if name in ("confidence_logits", "candidate_probs", "beam_probs") else 1e-4
        np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerance if got.dtype.kind == "f" else 0, err_msg=name)


def context(*counts: int, seed: int = 5) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(count, TAPS * HIDDEN, generator=random) for count in counts]


KINDS = [(markov, family) for family in ("qwen3", "gemma4") for markov in ("none", "vanilla", "gated", "rnn")]


@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A draft of every kind as it runs on the CPU."""
    return export(tmp_path_factory.mktemp("draft"), *request.param)


def test_every_intermediate_and_further_rounds(exported: Exported) -> None:
    """A ragged batch of two, then rounds after partial accepts: features of accepted rows only, one row at least."""
    texts = context(15, 9)
    runner, starts, counts = exported.open(2), [0, 0], [11, 5]
    for anchors, more in (([3, 8], [2, 1]), ([40, 7], [1, 3]), ([1, 2], [0, 0])):
        ends = [start + count for start, count in zip(starts, counts, strict=True)]
        parts = [text[start:end] for text, start, end in zip(texts, starts, ends, strict=True)]
        found = run(exported, runner, parts, starts, anchors)
        assert len(found["draft_probs"]) == 0
        for row in range(2):
            check(found, exported.reference(texts[row][: ends[row]], anchors[row]), row, starts[row])
        starts, counts = ends, more


def test_sampling_draws_from_the_distribution_it_returns(exported: Exported) -> None:
    """Greedy and drawn sequences in one batch; ``draft_probs`` has a row for each that draws, in order."""
    features = context(9, 7, 8)
    random, heats = torch.Generator().manual_seed(11), [0.7, 0.0, 1.3]
    for _ in range(6):
        uniforms = torch.rand(3, exported.shape.block, generator=random)
        found = run(exported, exported.open(3), features, [0, 0, 0], [21, 4, 60], heats, uniforms)
        assert len(found["draft_probs"]) == 2
        for row, (anchor, heat) in enumerate(zip((21, 4, 60), heats, strict=True)):
            expected = exported.reference(features[row], anchor, heat, uniforms[row])
            check(found, expected, row)
            if heat:
                probs = found["draft_probs"][row // 2]
                np.testing.assert_allclose(probs, expected["draft_probs"].numpy(), rtol=0, atol=1e-5)


CONVENTIONS: dict[str, dict[str, Any]] = {
    "own-position slots": {"markov": "none", "first_slot": 1, "block": 5, "confidence": False},
    "own-position slots with a Markov head": {"first_slot": 1, "block": 5},
    "windows": {"windows": (6, None)},
    "windows, causal in the block": {"windows": (6, 3), "causal": True},
    "draft vocabulary": {"draft_vocabulary": torch.arange(3, VOCAB, 2)},
    "draft vocabulary with the mask": {"draft_vocabulary": torch.arange(0, VOCAB, 2), "mask_weight": 3.0},
    "Markov head on few candidates": {"markov_topk": 6, "mask_weight": 3.0},
    "recurrent head on few candidates": {"markov": "rnn", "markov_topk": 6},
    "few candidates of a draft vocabulary": {"markov_topk": 5, "draft_vocabulary": torch.arange(3, VOCAB, 2)},
    "one layer": {"layers": 1},
    "standard graph": {"variant": "standard"},
    "float16": {"dtype": "float16"},
    "bfloat16": {"dtype": "bfloat16", "family": "gemma4"},
}


@pytest.mark.parametrize("options", CONVENTIONS.values(), ids=CONVENTIONS)
def test_other_conventions(options: dict[str, Any], tmp_path: Path) -> None:
    """Two rounds, the second drawn. Half-precision weights compute in float32 on the CPU, with their stored values."""
    exported = export(tmp_path, **options)
    (features,), runner = context(13, seed=2), exported.open(1)
    check(run(exported, runner, [features[:11]], [0], [21]), exported.reference(features[:11], 21))
    uniforms = torch.rand(
        1, exported.shape.block - exported.shape.first_slot, generator=torch.Generator().manual_seed(3)
    )
    found = run(exported, runner, [features[11:]], [11], [33], [0.9], uniforms)
    expected = exported.reference(features, 33, 0.9, uniforms[0])
    check(found, expected, start=11)
    np.testing.assert_allclose(found["draft_probs"][0], expected["draft_probs"].numpy(), rtol=0, atol=1e-5)


def test_from_scratch_is_what_rounds_have_left(exported: Exported) -> None:
    """Keys and values of a context taken in by several passes are those of one pass over all of it."""
    (features,) = context(12, seed=8)
    runner = exported.open(1)
    for start, end in ((0, 5), (5, 6), (6, 10), (10, 12)):
        found = run(exported, runner, [features[start:end]], [start], [17])
    at_once = run(exported, exported.open(1), [features], [0], [17])
    for name in INNER - {"ctx_features"} | {"draft_tokens", "candidate_probs", "beam_probs"}:
        np.testing.assert_allclose(found[name], at_once[name], rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("markov", ["none", "vanilla"])
def test_the_mask_token_is_never_drafted(markov: str, tmp_path: Path) -> None:
    exported = export(tmp_path, markov, mask_weight=3.0)
    seen = 0
    for seed in range(40):
        found = run(exported, exported.open(1), context(9, seed=seed), [0], [seed])
        top = found["corrected_logits"].argmax(-1)
        assert not any(VOCAB - 1 in found[f"{name}_tokens"] for name in ("draft", "candidate", "beam"))
        assert np.isfinite(found["corrected_logits"]).all() and np.isfinite(found["base_logits"]).all()
        assert ((found["draft_tokens"] == top) | (top == VOCAB - 1)).all()
        seen += int((top == VOCAB - 1).sum())
    assert seen  # it would have been the most likely token somewhere


def test_a_bundles_graph_has_standard_operators_and_keeps_inner_names(tmp_path: Path) -> None:
    checkpoint, _ = random_block("rnn")
    table = torch.randn(VOCAB, HIDDEN)
    graph = export_block_drafter(checkpoint, embedding=table, head=table, name="draft", dtype="float32")
    optimize(graph)
    variant = ort_cpu_variants(graph, 512)["onnxruntime-cpu"]
    paths = save_graphs({"draft": hide_inner_values(graph), "cpu": hide_inner_values(variant)}, tmp_path)
    for path in paths.values():
        model = onnx.load(path, load_external_data=False)
        assert not {output.name for output in model.graph.output} & INNER
        inside = {name for node in model.graph.node for name in node.output}
        layers = {f"ctx_{part}.{i}" for part in ("keys", "values") for i in range(2)}
        assert inside >= INNER | layers
    assert {node.domain for node in onnx.load(paths["draft"], load_external_data=False).graph.node} == {""}


def test_fewer_markov_candidates_than_wanted_are_refused() -> None:
    checkpoint, _ = random_block()
    table = torch.randn(VOCAB, HIDDEN)
    with pytest.raises(UsageError, match="markov_topk=3: a slot has 4 candidates"):
        export_block_drafter(
            checkpoint, embedding=table, head=table, name="draft", dtype="float32", markov_topk=3, candidates=4
        )
