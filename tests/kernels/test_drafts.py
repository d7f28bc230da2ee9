"""Block drafters on the sequence kernels: the reference's values, and bits that depend on a sequence alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from dspark_runtime.backends.ort_kernels import LIBRARY_VARIABLE, NO_LIBRARY
from dspark_runtime.bundle.precisions import Weights
from tests.parity.block_drafts import Exported, check, context, export, run
from tests.references.draft_samples import VOCAB

OPTIONS: dict[str, dict[str, Any]] = {
    "vanilla": {},
    "none": {"markov": "none"},
    "gemma": {"family": "gemma4"},
    "gated": {"markov": "gated"},
    "rnn": {"markov": "rnn"},
    "own-position slots": {"markov": "none", "first_slot": 1, "block": 5, "confidence": False},
    "windows": {"windows": (6, None)},
    "windows, causal in the block": {"windows": (6, 3), "causal": True},
    "draft vocabulary": {"draft_vocabulary": torch.arange(3, VOCAB, 2)},
    "draft vocabulary with the mask": {"draft_vocabulary": torch.arange(0, VOCAB, 2), "mask_weight": 3.0},
    "Markov head on few candidates": {"markov_topk": 6, "mask_weight": 3.0},
    "one slot": {"block": 1},
    "float16": {"dtype": "float16"},
    "bfloat16": {"dtype": "bfloat16"},
}
STANDARD = {"gated", "rnn", "Markov head on few candidates"}
"""Heads without a kernel: what follows the logits keeps its standard form there."""


@pytest.fixture(params=["kernels", "bodies"])
def drafter(
    request: pytest.FixtureRequest, library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Exported]:
    """Exports a random draft and opens it with the library, or without one."""
    monkeypatch.setenv(LIBRARY_VARIABLE, str(library) if request.param == "kernels" else NO_LIBRARY)
    return lambda **options: export(tmp_path, variant="sequence-kernels", **options)


@pytest.mark.parametrize("name", OPTIONS)
def test_drafts_are_those_of_the_reference(name: str, drafter: Callable[..., Exported], tmp_path: Path) -> None:
    """A ragged batch of three, then a round in which two of them draw."""
    exported = drafter(**OPTIONS[name])
    called = {n.op_type for n in onnx.load(tmp_path / "sequence-kernels.onnx", load_external_data=False).graph.node}
    assert "Attention" not in called and bool(called & {"TopK", "Softmax"}) == (name in STANDARD)
    texts, runner, drafts = context(13, 6, 9), exported.open(3), exported.shape.block - exported.shape.first_slot
    starts, counts, anchors = [0, 0, 0], [11, 5, 9], [21, 4, 60]
    for heats in (None, [0.7, 0.0, 1.3]):
        ends = [start + count for start, count in zip(starts, counts, strict=True)]
        uniforms = torch.rand(3, drafts, generator=torch.Generator().manual_seed(3))
        parts = [text[start:end] for text, start, end in zip(texts, starts, ends, strict=True)]
        found = run(exported, runner, parts, starts, anchors, heats, uniforms)
        assert len(found["draft_probs"]) == (2 if heats else 0)
        for row, (anchor, end) in enumerate(zip(anchors, ends, strict=True)):
            heat = heats[row] if heats else 0.0
            expected = exported.reference(texts[row][:end], anchor, heat, uniforms[row])
            check(found, expected, row, starts[row])
            if heat:
                probs = found["draft_probs"][row // 2]
                np.testing.assert_allclose(probs, expected["draft_probs"].numpy(), rtol=0, atol=1e-5)
        starts, counts = ends, [2, 1, 0]


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4", "w8a8"])
@pytest.mark.parametrize("name", ["vanilla", "none"])
def test_bits_of_a_draft_depend_on_its_sequence_alone(
    name: str, precision: Weights, library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone in one pass or in several, and beside others that are ahead or behind."""
    monkeypatch.setenv(LIBRARY_VARIABLE, str(library))
    exported = export(tmp_path, variant="sequence-kernels", precision=precision, hidden=64, rank=64, **OPTIONS[name])
    features, others = context(20, 7, 1, seed=2, hidden=64), [3, 40]
    uniforms = torch.rand(3, exported.shape.block, generator=torch.Generator().manual_seed(1))
    for heat in (0.0, 0.9):
        alone = run(exported, exported.open(1), features[:1], [0], [21], [heat], uniforms[:1])
        runner = exported.open(1)
        for start, end in ((0, 9), (9, 10), (10, 20)):
            parts = [features[0][start:end]]
            in_parts = run(exported, runner, parts, [start], [21], [heat], uniforms[:1])
        beside = run(exported, exported.open(3), features, [0, 0, 0], [21, *others], [heat, 1.0, 0.0], uniforms)
        for key, wanted in alone.items():
            assert np.array_equal(in_parts[key], wanted), key
            assert np.array_equal(beside[key][: len(wanted)], wanted), key
