"""What engines are compiled from computes what the bundle's graph does: both run in ONNX Runtime, in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dspark_export.bundle.weights import save_graphs
from dspark_export.graphs.target import export_target
from dspark_export.passes import optimize
from dspark_export.passes.draw_for_all import DrawForAll
from dspark_export.passes.equal_attention_widths import EqualAttentionWidths
from dspark_export.passes.gather_experts import GatherExperts
from dspark_export.passes.pin_capacity import PinCapacity
from dspark_runtime.backends.ort_graph import OrtGraphEngine
from dspark_runtime.bundle.contract import CacheLayer
from tests import tiny_models
from tests.engines.test_drafters import BLOCKS, block_graph
from tests.parity.harness import CAPACITY, GraphRunner, Tree, assert_close
from tests.references.draft_samples import HIDDEN, KV_HEADS, TAPS, VOCAB, WIDTH

CASES: dict[str, tuple[dict[str, int], set[str]]] = {
    "deepseek_v3": ({}, {"Loop", "Unique"}),  # experts, and values narrower than keys
    "gpt_oss": ({}, {"Loop", "Unique"}),  # experts whose matrices lie the other way round, and sinks
    "llama": ({"head_dim": 12}, set()),  # heads of a width no kernel exists for
}


@pytest.mark.parametrize("arch", CASES)
def test_decoders_compute_the_same(arch: str, tmp_path: Path) -> None:
    overrides, gone = CASES[arch]
    _, model = tiny_models.make(arch, num_hidden_layers=2, **overrides)
    standard = optimize(export_target(model))
    rewritten = standard.clone()
    assert {node.op_type for node in standard.graph} >= gone
    assert GatherExperts()(rewritten).modified == bool(gone)
    assert EqualAttentionWidths()(rewritten).modified
    assert PinCapacity(CAPACITY)(rewritten).modified
    assert not gone & {node.op_type for node in rewritten.graph}
    paths = save_graphs({"standard": standard, "rewritten": rewritten}, tmp_path)
    rng = np.random.default_rng(0)
    prompt = Tree.chain([int(token) for token in rng.integers(3, tiny_models.VOCAB, 20)])
    trees = [Tree.random(rng, 7, tiny_models.VOCAB) for _ in range(2)]
    results = []
    for name in ("standard", "rewritten"):
        runner = GraphRunner(paths[name], batch=2)
        logits = runner.step([prompt, prompt])
        for sequence in range(2):
            runner.commit(sequence, prompt, 19)
        results.append([*logits, *runner.step(trees)])
    for wanted, found in zip(*results, strict=True):
        assert_close(found, wanted)


@pytest.mark.parametrize("kind", ["dspark", "dflash", pytest.param("recurrent", marks=pytest.mark.slow)])
def test_block_drafters_draw_the_same(kind: str, tmp_path: Path) -> None:
    standard = block_graph(torch.float32, 8 if kind == "recurrent" else None, **BLOCKS[kind])
    rewritten = standard.clone()
    assert DrawForAll()(rewritten).modified
    assert "NonZero" not in {node.op_type for node in rewritten.graph}
    paths = save_graphs({"standard": standard, "rewritten": rewritten}, tmp_path)
    temperature = np.array([0.0, 7.0, 0.0, 9.0], np.float32)
    wanted, found = (drafted(paths[name], temperature) for name in ("standard", "rewritten"))
    assert wanted["draft_probs"].shape[0] == 2 and found["draft_probs"].shape[0] == 4
    found["draft_probs"] = found["draft_probs"][temperature > 0]
    for name, array in wanted.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-5, atol=1e-6, err_msg=name)
    greedy = drafted(paths["rewritten"], np.zeros(4, np.float32))
    assert not np.array_equal(greedy["draft_tokens"][1], found["draft_tokens"][1])
    assert all(np.isfinite(array).all() for array in greedy.values())


def drafted(path: Path, temperature: Any) -> dict[str, Any]:
    """One pass of four sequences with eleven context rows each."""
    engine = OrtGraphEngine(path, name="block", cache=[CacheLayer(KV_HEADS, WIDTH, WIDTH)] * 2)
    rng, batch, rows, block = np.random.default_rng(1), 4, 11, 4
    runner = engine.open(engine.allocate(batch, CAPACITY))
    drafts = next(o.shape[1] for o in engine.session.get_outputs() if o.name == "draft_tokens")
    return runner.run(
        {
            "target_features": rng.standard_normal((batch, rows, TAPS * HIDDEN)).astype(np.float32),
            "feature_positions": np.tile(np.arange(rows), (batch, 1)),
            "anchor_ids": rng.integers(0, VOCAB - 1, batch),
            "block_positions": np.tile(np.arange(rows, rows + block), (batch, 1)),
            "attention_mask": np.ones((batch, 1, block, rows + block), bool),
            "write_indices": np.zeros(batch, np.int64),
            "temperature": temperature,
            "uniforms": rng.random((batch, drafts), np.float32),
        }
    )
