"""The drafter that comes with the quickstart: small enough, described, of use, and never changing a text."""

from __future__ import annotations

import json

import numpy as np
import pytest

from dspark_runtime import Bundle
from tests.real_model.conftest import DRAFTER

PROMPTS = [
    "Tom has 12 pencils. He gives 3 to each of his 2 sisters and buys 5 more. How many pencils does he have now?",
    "Write a Python function that returns the largest even number of a list.",
    "What are the advantages of learning to play an instrument?",
]
CHAIN_FLOOR, TREE_FLOOR = 1.8, 2.3
"""Accepted length, bonus included, over these prompts, of the chain alone and of trees of 15 drafts, less a tenth:
2.06 and 2.69 were measured. Broken features give 1.1."""


def test_size_and_card() -> None:
    assert sum(path.stat().st_size for path in DRAFTER.iterdir()) < 24 * 10**6
    card, facts = (DRAFTER / "README.md").read_text(), json.loads((DRAFTER / "training.json").read_text())
    for said in ("license: apache-2.0", "SmolLM2-135M-Instruct", f"**{facts['accepted_length']:.2f}**", "responses"):
        assert said in card
    assert (DRAFTER / "curves.png").is_file()


@pytest.mark.parametrize("mode", ["dspark", "ngram+dspark", "auto"])
def test_text_is_that_of_plain_decoding(drafted: Bundle, mode: str) -> None:
    for options in ({}, {"temperature": 0.8, "seed": 5}):
        plain, fast = (
            drafted.generate(PROMPTS, chat=True, max_new_tokens=64, speculate=each, **options) for each in ("off", mode)
        )
        assert [g.tokens for g in fast] == [g.tokens for g in plain]


@pytest.mark.parametrize(
    ("options", "floor"), [({"draft_branches": 1}, CHAIN_FLOOR), ({"draft_length": 15}, TREE_FLOOR)]
)
def test_it_is_accepted(drafted: Bundle, options: dict[str, int], floor: float) -> None:
    """Text stays right whatever a drafter says: only this shows a broken one."""
    drafts = next(entry.block.drafts for entry in drafted.manifest.drafters if entry.block)
    fixed = {"draft_length": drafts, **options}
    found = [drafted.generate(p, chat=True, max_new_tokens=96, speculate="dspark", **fixed) for p in PROMPTS]
    rounds, emitted = (sum(getattr(g.stats, name) for g in found) for name in ("rounds", "emitted"))
    assert (emitted - len(found)) / rounds > floor


def test_its_confidences_mean_what_they_say(drafted: Bundle) -> None:
    block = next(entry.block for entry in drafted.manifest.drafters if entry.block)
    assert block.confidence_temperatures is not None and np.all(np.array(block.confidence_temperatures) > 0)
    facts = json.loads((DRAFTER / "training.json").read_text())
    assert facts["calibration_error"][1] < 0.03 and facts["calibration_error"][1] <= facts["calibration_error"][0]
