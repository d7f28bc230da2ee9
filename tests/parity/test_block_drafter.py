"""Graphs of block drafters in ONNX Runtime against the step-by-step reference, at every intermediate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from dspark_export.bundle.weights import save_graphs
from dspark_export.drafts.graphs.block import export_block_drafter
from dspark_export.passes import optimize, ort_cpu_variants
from dspark_export.passes.inner_values import hide_inner_values
from dspark_runtime.errors import UsageError
from tests.parity.block_drafts import INNER, Exported, check, context, export, run
from tests.references.draft_samples import HIDDEN, VOCAB, random_block

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
