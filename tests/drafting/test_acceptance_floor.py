"""A drafter that fits its target is accepted, and stops being so when features go astray.

Text cannot show this: a broken draft only costs time. So a drafter is fitted to one text of a tiny target, in plain
PyTorch on the reference, and its acceptance in the runtime has a floor. It learns with wrong anchors as often as with
right ones, so that what it knows comes from the features.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dspark_export.build.options import BuildOptions
from dspark_export.build.pipeline import build
from dspark_runtime import Bundle
from dspark_runtime.backends.ort_graph import OrtGraphRunner
from dspark_runtime.bundle.draft_contract import BLOCK_POSITIONS
from dspark_runtime.drafters.block import BlockDrafter
from tests.drafting.conftest import Pairs
from tests.drafting.test_bundle_with_drafts import LONG, generate
from tests.references.block_reference import Shape, draft

FLOOR = 3.5  # accepted length, the bonus token included; at most 5 with 4 drafts
STEPS = 200
TEXT: dict[str, Any] = {"temperature": 1.0, "seed": 7}  # drawn: greedy text of random weights repeats itself


@pytest.fixture(scope="module")
def fitted(pairs: Pairs, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle whose DSpark draft knows a text after ``LONG`` by heart."""
    folder = tmp_path_factory.mktemp("fitted")
    text = [*LONG, *generate(pairs.bundle, LONG, "off", **TEXT).tokens]
    facts = pairs.bundle.manifest.drafters[2].block
    assert facts is not None
    model = AutoModelForCausalLM.from_pretrained(pairs.target, dtype=torch.float32).eval()
    with torch.no_grad():
        states = model(torch.tensor([text]), output_hidden_states=True).hidden_states
    features = torch.cat([states[tap + 1][0] for tap in facts.taps], -1)
    weights = {name: tensor.clone().requires_grad_() for name, tensor in pairs.dspark.tensors.items()}
    shape = Shape(2, 4, 2, 16, 4, 0, facts.mask_token_id, markov="vanilla", confidence_with_markov=True)
    optimizer = torch.optim.Adam([w for n, w in weights.items() if "confidence" not in n], lr=4e-3)
    random = np.random.default_rng(0)
    anchors = np.arange(len(LONG), len(text) - 4)
    for _ in range(STEPS):
        loss = torch.zeros(())
        for anchor in random.choice(anchors, 5, replace=False):
            seen = text[anchor] if random.random() < 0.5 else int(random.integers(5, 380))
            found = draft(shape, weights, *pairs.tables, features[:anchor], seen)
            labels = torch.tensor(text[anchor + 1 : anchor + 5])
            loss = loss + torch.nn.functional.cross_entropy(found["corrected_logits"], labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    shutil.copytree(pairs.dspark.folder, folder / "draft")
    file = folder / "draft" / "model.safetensors"
    stored = load_file(file)
    save_file({n: weights[n].detach() if n in weights else t for n, t in stored.items()}, file)
    build(
        BuildOptions(
            model=str(pairs.target), out=folder / "b.dspark", drafts=(str(folder / "draft"),), self_draft="none"
        )
    )
    return Bundle.open(folder / "b.dspark", threads=1)


def accepted_length(bundle: Bundle) -> float:
    plain = generate(bundle, LONG, "off", **TEXT).tokens
    found = generate(bundle, LONG, "dspark", draft_length=4, draft_branches=1, draft_sampling="greedy", **TEXT)
    assert found.tokens == plain
    return float(found.stats.accepted_length)


def test_a_fitted_drafter_is_accepted(fitted: Bundle) -> None:
    assert accepted_length(fitted) >= FLOOR


def late(observe: Any, self: BlockDrafter, request: int, row: int, features: np.ndarray) -> None:
    observe(self, request, row, np.roll(features, 1, axis=0) if len(features) > 1 else features * 0)


def swapped(observe: Any, self: BlockDrafter, request: int, row: int, features: np.ndarray) -> None:
    observe(self, request, row, np.roll(features, features.shape[1] // 3, axis=1))


def rejected(observe: Any, self: BlockDrafter, request: int, row: int, features: np.ndarray) -> None:
    observe(self, request, row, features if len(features) > 8 else np.tile(features[:1], (len(features), 1)))


@pytest.mark.parametrize("fault", [late, swapped, rejected])
def test_broken_plumbing_falls_below_the_floor(fitted: Bundle, fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BlockDrafter, "observe", _with(fault, BlockDrafter.observe))
    assert accepted_length(fitted) < FLOOR


def _with(fault: Any, observe: Any) -> Any:
    return lambda self, request, row, features: fault(observe, self, request, row, features)


def test_positions_one_off_fall_below_the_floor(fitted: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    run = OrtGraphRunner.run

    def early(self: OrtGraphRunner, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if BLOCK_POSITIONS in inputs:
            inputs[BLOCK_POSITIONS] = inputs[BLOCK_POSITIONS] - 1
        return run(self, inputs)

    monkeypatch.setattr(OrtGraphRunner, "run", early)
    assert accepted_length(fitted) < FLOOR


def test_nothing_is_left_half_built(fitted: Bundle) -> None:
    root = Path(fitted.files.root)
    assert sorted(path.name for path in root.parent.iterdir() if "partial" in path.name) == []
