"""Overlapping work with a pass changes only the time: chunks, texts and statistics are those of waiting at once.

The device is imitated in host memory and as late as it may be (tests/engines/host_cuda.py): what does not wait for what
it needs computes something else.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from dspark_runtime import Bundle
from dspark_runtime.decoding.sequence import Chunk
from dspark_runtime.drafters.base import Draft, Drafter, DraftRequest
from dspark_runtime.drafters.block import BlockDrafter
from dspark_runtime.drafters.eagle3 import Eagle3Drafter
from dspark_runtime.drafters.parts import DraftOptions
from dspark_runtime.errors import BackendError
from dspark_runtime.speculation.tree import TokenTree
from tests.drafting.conftest import Pairs
from tests.drafting.imitated import PROMPTS, RANGES, Opened
from tests.drafting.test_device_backend import counts
from tests.engines.host_cuda import HostCuda

MODES = ["off", "ngram", "dspark", "eagle3", "ngram+dspark", "draft-model"]
TOKENS = 24


class Forgetful(HostCuda):
    """Streams of one lane do not wait for the others."""

    lane = ""

    def wait(self, stream: int, event: int) -> None:
        if self.lanes[stream] != self.lane:
            super().wait(stream, event)


@pytest.fixture(scope="module")
def opened(pairs: Pairs, tmp_path_factory: pytest.TempPathFactory) -> Opened:
    return Opened(pairs.bundle.files.root, tmp_path_factory.mktemp("overlapped") / "bundle")


@pytest.fixture(scope="module")
def serial(pairs: Pairs, tmp_path_factory: pytest.TempPathFactory) -> Opened:
    return Opened(pairs.bundle.files.root, tmp_path_factory.mktemp("serial") / "bundle", overlap=False)


def generated(bundle: Bundle, mode: str, **options: Any) -> tuple[list[Chunk], list[dict[str, Any]]]:
    drafts = {} if mode == "off" else {"draft_length": 5}
    wanted = {"max_new_tokens": TOKENS, "ignore_eos": True, **drafts, **options}
    stream = bundle.generate(PROMPTS, speculate=mode, stream=True, **wanted)
    chunks = list(stream)
    return chunks, [counts(generation) for generation in stream.generations]


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("mode", MODES)
def test_chunks_and_statistics_are_those_of_waiting(opened: Opened, serial: Opened, mode: str, batch_size: int) -> None:
    for options in ({}, {"temperature": 0.9, "seed": 2}):
        expected = generated(serial.bundle, mode, batch_size=batch_size, **options)
        assert generated(opened.bundle, mode, batch_size=batch_size, **options) == expected


def test_texts_end_where_they_did(pairs: Pairs, opened: Opened) -> None:
    """Stop strings need the text before the next pass; an end of text or a length does not."""
    plain = pairs.bundle.generate(PROMPTS, max_new_tokens=TOKENS, ignore_eos=True)
    for start in (2, 7):
        stops = [generation.text[start : start + 2] for generation in plain]
        for mode in ("ngram", "dspark"):
            options = {"stop": [stop for stop in stops if stop], "ignore_eos": False}
            assert generated(opened.bundle, mode, **options)[0] == generated(pairs.bundle, mode, **options)[0]


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("mode", ["off", "ngram"])
def test_the_host_waits_once_a_round(opened: Opened, mode: str, batch_size: int) -> None:
    before = opened.cuda.waited
    _, found = generated(opened.bundle, mode, batch_size=batch_size)
    rounds = [stats["rounds"] for stats in found]
    prompts = sum(-(-len(prompt) // RANGES.chunk) for prompt in PROMPTS)
    assert opened.cuda.waited - before == prompts + (max(rounds) if batch_size == 3 else sum(rounds))


def test_features_of_the_target_never_come_to_the_host(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("features in host memory")

    for drafter in (BlockDrafter, Eagle3Drafter):
        monkeypatch.setattr(drafter, "observe", refuse)
    for mode in ("dspark", "eagle3"):
        assert generated(opened.bundle, mode)[1]


def proposed(bundle: Bundle, name: str) -> list[tuple[list[int], list[int]]]:
    """Every tree of a drafter that is asked in every third round: its features wait while the passes between run."""
    (drafter,) = bundle._choice().make(name, True, DraftOptions())
    propose, trees = drafter.propose, list[TokenTree]()
    rounds = itertools.count()

    def sometimes(requests: Sequence[DraftRequest]) -> list[Draft | None]:
        drafts = propose(requests) if next(rounds) % 3 == 2 else [None] * len(requests)
        trees.extend(draft.tree for draft in drafts if draft is not None)
        return drafts

    drafter.propose = sometimes  # type: ignore[method-assign]
    bundle.generate(PROMPTS, speculate=drafter, max_new_tokens=TOKENS, ignore_eos=True, draft_length=5)
    return [(tree.tokens, tree.parents) for tree in trees]


@pytest.mark.parametrize("name", ["dspark", "eagle3", "dflash"])
def test_features_arrive_as_they_were(pairs: Pairs, opened: Opened, serial: Opened, name: str) -> None:
    trees = proposed(opened.bundle, name)
    assert len(trees) > 10 and trees == proposed(serial.bundle, name)
    assert trees == proposed(pairs.bundle, name)


@pytest.mark.parametrize("lane", ["copy", "target"])
def test_a_wait_that_is_left_out_shows(pairs: Pairs, serial: Opened, tmp_path: Path, lane: str) -> None:
    cuda = Forgetful()
    cuda.lane = lane
    broken = Opened(pairs.bundle.files.root, tmp_path / "bundle", cuda=cuda)
    try:
        trees = proposed(broken.bundle, "dspark")
    except (AssertionError, BackendError):
        return  # what had not run yet has no time
    assert trees != proposed(serial.bundle, "dspark")


@pytest.mark.parametrize("at", [0, 4, 9])
def test_a_cancelled_text_ends_where_it_did(pairs: Pairs, opened: Opened, at: int) -> None:
    def cancelled(bundle: Bundle) -> list[tuple[list[int], str, Any]]:
        stream = bundle.generate(PROMPTS, speculate="ngram", draft_length=4, stream=True, max_new_tokens=TOKENS)
        for number, _ in enumerate(stream):
            if number == at:
                stream.cancel()
        return [(g.tokens, g.text, counts(g)["rounds"]) for g in stream.generations]

    assert cancelled(opened.bundle) == cancelled(pairs.bundle)
    assert generated(opened.bundle, "ngram")[0] == generated(pairs.bundle, "ngram")[0]  # nothing is left of it


class Failing(Drafter):
    """Fails in its third round."""

    name = "failing"
    rounds = 0

    def draft(self, request: DraftRequest) -> None:
        self.rounds += 1
        if self.rounds == 3:
            raise BackendError("the drafter failed")


def test_what_is_committed_is_given_out_when_a_round_cannot_begin(pairs: Pairs, opened: Opened) -> None:
    def given(bundle: Bundle) -> list[Chunk]:
        chunks = []
        with pytest.raises(BackendError, match="the drafter failed"):
            for chunk in bundle.generate(PROMPTS[0], speculate=Failing(), stream=True, draft_length=2):
                chunks.append(chunk)
        return chunks

    assert given(opened.bundle) == given(pairs.bundle)
    assert len(given(opened.bundle)) == 3
    assert generated(opened.bundle, "off")[0] == generated(pairs.bundle, "off")[0]


def test_a_caller_may_leave_in_the_middle(pairs: Pairs, opened: Opened) -> None:
    iterator = iter(opened.bundle.generate(PROMPTS, speculate="dspark", stream=True, max_new_tokens=TOKENS))
    for _ in range(6):
        next(iterator)
    iterator.close()  # type: ignore[attr-defined]
    assert generated(opened.bundle, "dspark")[0] == generated(pairs.bundle, "dspark")[0]


def test_time_of_the_caller_is_not_time_of_decoding(opened: Opened) -> None:
    stream = opened.bundle.generate(PROMPTS[0], speculate="off", stream=True, max_new_tokens=8, ignore_eos=True)
    for _ in stream:
        time.sleep(0.2)
    assert stream.generations[0].stats.seconds.decode < 0.8


@pytest.mark.parametrize("overlap", [True, False])
def test_threads_share_a_bundle(pairs: Pairs, opened: Opened, serial: Opened, overlap: bool) -> None:
    options: dict[str, Any] = {"speculate": "ngram+dspark", "draft_length": 4, "max_new_tokens": 16}
    expected = [pairs.bundle.generate(prompt, **options).tokens for prompt in PROMPTS]
    bundle = (opened if overlap else serial).bundle
    with ThreadPoolExecutor(3) as pool:
        found = pool.map(lambda p: bundle.with_fresh_schedule().generate(p, **options).tokens, PROMPTS * 3)
        assert list(found) == expected * 3
