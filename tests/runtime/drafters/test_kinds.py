"""A kind of drafter is described in one place and named once; what all kinds share is written once."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from dspark_runtime.bundle.manifest import BlockFacts, DrafterEntry, EagleFacts, TrainedKind
from dspark_runtime.drafters import choice
from dspark_runtime.drafters.estimates import EDGES, bucket, expected, over_target
from dspark_runtime.drafters.ngram import NgramDrafter
from dspark_runtime.drafters.parts import required
from dspark_runtime.errors import BackendError, DamagedBundle

ROOT = Path(__file__).resolve().parents[3]
BLOCK = BlockFacts(taps=(0, 2), block=4, drafts=4, mask_token_id=1, candidates=2, confidence=False)
EAGLE = EagleFacts(taps=(1,), steps=3, vocab_map="drafts/e.vocab.npy")


def test_every_trained_kind_can_be_made() -> None:
    assert tuple(choice._TRAINED) == get_args(TrainedKind)


def test_an_entry_answers_for_its_kind() -> None:
    block = DrafterEntry(name="b", kind="block", block=BLOCK)
    eagle = DrafterEntry(name="e", kind="eagle3", graph="e-extend", eagle3=EAGLE)
    model = DrafterEntry(name="m", kind="draft_model")
    assert [entry.trained for entry in (block, eagle, model)] == [True] * 3
    assert not DrafterEntry(name="ngram", kind="ngram").trained
    assert (block.taps, block.vocab_map, block.graph_name) == ((0, 2), None, "b")
    assert (eagle.taps, eagle.vocab_map, eagle.graph_name) == ((1,), "drafts/e.vocab.npy", "e-extend")
    assert (model.taps, model.vocab_map, model.facts) == ((), None, None)


def test_an_entry_without_its_facts_is_damage() -> None:
    entry = DrafterEntry(name="b", kind="block")
    with pytest.raises(DamagedBundle, match="drafter b of kind block lacks its facts"):
        required(entry.block, entry)
    assert required(BLOCK, entry) is BLOCK


def test_kinds_are_listed_in_one_place() -> None:
    listed = re.compile(r"\"block\",\s*\"eagle3\"")
    sources = [path for folder in ("dspark_export", "runtime", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    found = [path.name for path in sources if listed.search(path.read_text(encoding="utf-8"))]
    assert found == ["manifest.py"]


def test_a_drafter_that_is_not_attached_says_so() -> None:
    with pytest.raises(BackendError, match=r"drafter ngram is not attached to a cache; call attach\(\) first"):
        NgramDrafter().attached(None)


def test_estimates_are_taken_at_their_word() -> None:
    assert [bucket(estimate) for estimate in (0.0, 0.1, 0.55, 1.0)] == [0, 1, 5, len(EDGES)]
    assert bucket(0.6, (0.3, 0.5)) == 2
    assert [expected(("probability", number)) for number in (0, 5, 10)] == [0.05, 0.55, 0.985]
    assert expected("unknown") == 0.6


def test_distributions_over_the_targets_ids() -> None:
    probs = np.array([0.25, 0.75], np.float32)
    assert over_target(probs, 2, None) is probs
    assert over_target(probs, 4, None).tolist() == [0.25, 0.75, 0.0, 0.0]
    wide = over_target(np.stack((probs, probs)), 4, np.array([3, 1]))
    assert wide.dtype == np.float32 and wide.tolist() == [[0.0, 0.75, 0.0, 0.25]] * 2
