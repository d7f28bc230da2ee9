"""Engines of every kind of drafter's graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch

from dspark_export.drafts.graphs.block import export_block_drafter
from dspark_export.drafts.graphs.draft_model import export_draft_model
from dspark_export.graphs.decoder import DecoderTrace
from dspark_export.graphs.target import export_target
from dspark_export.passes import optimize
from dspark_export.passes.inner_values import hide_inner_values
from tests import tiny_models
from tests.engines.graphs import RANGES, save
from tests.engines.test_compile import check
from tests.parity import test_eagle_drafter
from tests.references.draft_samples import HIDDEN, VOCAB, random_block

BLOCKS: dict[str, dict[str, Any]] = {
    "dspark": {"markov": "vanilla"},
    "recurrent": {"markov": "rnn", "windows": (None, 8), "causal": True},
    "dflash": {"markov": "none", "first_slot": 1, "confidence": False},
}


def block_graph(dtype: torch.dtype, markov_topk: int | None = None, **sample: Any) -> ir.Model:
    """The graph of a random block drafter, as a build saves it."""
    checkpoint, _ = random_block(**sample)
    random = torch.Generator().manual_seed(9)
    embedding, head = (torch.randn(VOCAB, HIDDEN, generator=random).to(dtype) for _ in range(2))
    graph = export_block_drafter(
        checkpoint,
        embedding=embedding,
        head=head,
        name="block",
        dtype=str(dtype).removeprefix("torch."),
        draft_vocabulary=None,
        markov_topk=markov_topk,
        embedding_scale=1.0,
    )
    return hide_inner_values(optimize(graph))


@pytest.mark.parametrize("kind", BLOCKS)
def test_block_drafters(kind: str, tmp_path: Path) -> None:
    topk = 8 if kind == "recurrent" else None
    saved = save(tmp_path, {"block": block_graph(torch.float16, topk, **BLOCKS[kind])})
    engine = saved.compile("block")
    check(saved, engine)
    decode, prefill = engine.profiles
    assert (decode.dims["features"][2], prefill.dims["features"][2]) == (RANGES.verify_rows, RANGES.chunk)


def test_eagle3(tmp_path: Path) -> None:
    test_eagle_drafter.export(tmp_path / "exported", dtype="float16", variant="standard")
    graphs = {name: ir.load(tmp_path / "exported" / f"{name}.onnx") for name in ("eagle-extend", "eagle-step")}
    saved = save(tmp_path / "saved", graphs)
    for name in graphs:
        check(saved, saved.compile(name))


def test_draft_models_and_targets_with_taps(tmp_path: Path) -> None:
    _, model = tiny_models.make("qwen3", dtype=torch.float16, head_dim=16, num_hidden_layers=2)
    trace = DecoderTrace(model)
    graphs = {"draft-model": export_draft_model(trace, name="draft-model"), "target": export_target(trace, taps=(0,))}
    for graph in graphs.values():
        optimize(graph)
    saved = save(tmp_path, graphs)
    for name in graphs:
        check(saved, saved.compile(name))
    assert "hidden_taps" in {spec.name for spec in saved.graphs["target"].outputs}
