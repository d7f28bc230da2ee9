"""Prompts begin with the context of texts that begin alike; no text depends on it."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from dspark_runtime.decoding.loop import DecodingLoop, LoopOptions
from dspark_runtime.decoding.prefixes import LEAST, KeptTexts, common_prefix
from dspark_runtime.decoding.request import Limits, Request, make_request
from dspark_runtime.decoding.sequence import SequenceState
from dspark_runtime.drafters.ngram import NgramDrafter
from dspark_runtime.drafters.self_draft import SelfDrafter
from tests.runtime.conftest import Tiny

CAPACITY = 160
BASE = [7, 301, 44, 9, 120, 5, 5, 88, 230, 17] * 8
PROMPTS = [BASE[:40], BASE[:41], BASE[:60], [*BASE[:50], 3, 4, 5], [*BASE[:33], 11], BASE[:20], BASE[3:50]]
NEW = 12


def request_of(tiny: Tiny, prompt: list[int], scope: str = "", tokens: int = NEW) -> Request:
    return make_request(prompt, Limits(tiny.vocab_size, CAPACITY), max_new_tokens=tokens, scope=scope)


def loop_of(tiny: Tiny, rows: int) -> DecodingLoop:
    drafters = [NgramDrafter(), SelfDrafter(tiny.self_few, pass_ms=1.0)]
    return tiny.loop(rows, CAPACITY, drafters, 3, LoopOptions(prefill_chunk=16, reuse_prefixes=True))


def finish(loop: DecodingLoop, request: Request) -> SequenceState:
    sequence = loop.admit(request)
    while not sequence.finished:
        loop.step()
    return sequence


@given(st.lists(st.integers(0, 1), max_size=80), st.lists(st.integers(0, 1), max_size=80), st.integers(0, 80))
def test_the_common_prefix(one: list[int], other: list[int], shared: int) -> None:
    other = [*one[:shared], *other]
    found = common_prefix(one, other)
    expected = next((i for i, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), None)
    assert found == (min(len(one), len(other)) if expected is None else expected)


def test_kept_texts_know_the_best_and_the_oldest() -> None:
    kept = KeptTexts()
    for row, text in ((1, [1, 2, 3]), (2, [1, 2, 9]), (3, [4])):
        kept.add(row, text, "")
    kept.add(4, [1, 2, 3, 4], "somebody else's")
    assert kept.best([1, 2, 9, 9], "") == (2, 3) and kept.best([5], "") == (0, 0)
    assert kept.best([1, 2, 3, 4], "") == (1, 3)
    assert kept.oldest([1, 2]) == 2 and kept.oldest([9]) is None
    kept.drop(2)
    assert 2 not in kept and len(kept) == 3


def test_a_conversation_goes_on_where_it_was(tiny: Tiny) -> None:
    loop = loop_of(tiny, 2)
    first = finish(loop, request_of(tiny, BASE[:40]))
    assert first.cached == 0
    longer = [*first.tokens, 9, 9, 9]
    second = finish(loop, request_of(tiny, longer))
    assert second.cached == len(first.tokens) - 1  # no pass has seen its last token
    assert second.generation().cached_tokens == second.cached
    assert second.generation().tokens == tiny.tokens([longer], tokens=NEW)[0]
    again = finish(loop, request_of(tiny, longer))
    assert again.cached == len(longer) - 1  # the last token of a prompt is computed for its logits
    assert again.generation() == second.generation()


def test_a_running_text_is_shared_and_goes_on(tiny: Tiny) -> None:
    loop = loop_of(tiny, 3)
    first = loop.admit(request_of(tiny, PROMPTS[0], tokens=40))
    while first.emitted < 5:
        loop.step()
    second, third = (loop.admit(request_of(tiny, PROMPTS[number])) for number in (2, 3))
    while loop.busy:
        loop.step()
    assert second.cached >= 40 and third.cached >= 40
    expected = [tiny.tokens([PROMPTS[0]], tokens=40)[0], *tiny.tokens([PROMPTS[2], PROMPTS[3]], tokens=NEW)]
    assert [s.generation().tokens for s in (first, second, third)] == expected


def test_a_text_that_is_about_to_be_shared_gives_way_to_no_other(tiny: Tiny) -> None:
    """Both rows hold a text: the prompt takes the place of one and shares the other."""
    loop = loop_of(tiny, 2)
    other = [90, *BASE[:50]]
    for prompt in (PROMPTS[2], other):
        finish(loop, request_of(tiny, prompt))
    again = finish(loop, request_of(tiny, PROMPTS[2]))
    assert again.cached == len(PROMPTS[2]) - 1
    assert again.generation().tokens == tiny.tokens([PROMPTS[2]], tokens=NEW)[0]


def test_scopes_share_nothing(tiny: Tiny) -> None:
    loop = loop_of(tiny, 3)
    finish(loop, request_of(tiny, PROMPTS[2], "one"))
    assert finish(loop, request_of(tiny, PROMPTS[2], "another")).cached == 0
    assert finish(loop, request_of(tiny, PROMPTS[2], "one")).cached == len(PROMPTS[2]) - 1


def test_short_prefixes_and_loops_without_reuse_share_nothing(tiny: Tiny) -> None:
    loop = loop_of(tiny, 1)
    finish(loop, request_of(tiny, BASE[: LEAST - 1]))
    assert finish(loop, request_of(tiny, BASE[: LEAST - 1])).cached == 0
    plain = tiny.loop(1, CAPACITY)
    finish(plain, request_of(tiny, PROMPTS[2]))
    assert finish(plain, request_of(tiny, PROMPTS[2])).cached == 0


class Traffic(RuleBasedStateMachine):
    """Any order of admitting, stepping and cancelling, with prompts that begin alike."""

    tiny: Tiny
    alone: list[list[int]]

    def __init__(self) -> None:
        super().__init__()
        self.loop = loop_of(self.tiny, 4)
        self.sequences: list[tuple[SequenceState, list[int]]] = []
        self.shared = 0

    @initialize()
    def keep_one(self) -> None:
        """There is a text to share from the beginning."""
        self.sequences.append((finish(self.loop, request_of(self.tiny, PROMPTS[2])), self.alone[2]))

    @precondition(lambda self: self.loop.free > 0)
    @rule(prompt=st.integers(0, len(PROMPTS) - 1), tokens=st.integers(1, NEW))
    def admit(self, prompt: int, tokens: int) -> None:
        sequence = self.loop.admit(request_of(self.tiny, PROMPTS[prompt], tokens=tokens))
        self.sequences.append((sequence, self.alone[prompt][:tokens]))

    @rule(rounds_first=st.booleans(), count=st.integers(1, 5))
    def step(self, rounds_first: bool, count: int) -> None:
        for _ in range(count):
            self.loop.step(rounds_first)

    @rule(which=st.integers(0, 10))
    def cancel(self, which: int) -> None:
        running = [sequence for sequence, _ in self.sequences if not sequence.finished]
        if running:
            self.loop.cancel(running[which % len(running)])

    @invariant()
    def rows_have_one_owner(self) -> None:
        batch, lengths = self.loop.batch, self.loop.cache.lengths
        owners = [s.row for s in batch.running] + ([batch.filling.row] if batch.filling else [])
        assert owners == list(range(len(owners)))
        for row in range(4):
            if row in batch.kept:
                assert row not in owners
                assert lengths[row] == len(batch.kept.text(row)[0])

    @invariant()
    def texts_are_right(self) -> None:
        for sequence, expected in self.sequences:
            emitted = sequence.tokens[len(sequence.request.prompt) :]
            assert emitted == expected[: len(emitted)]

    def teardown(self) -> None:
        for _ in range(200):
            if self.loop.busy:
                self.loop.step()
        assert not self.loop.busy
        Traffic.reused += sum(sequence.cached for sequence, _ in self.sequences)

    reused = 0


def test_any_traffic(tiny: Tiny) -> None:
    Traffic.tiny, Traffic.reused = tiny, 0
    Traffic.alone = tiny.tokens(PROMPTS, tokens=NEW)
    quiet = settings(
        max_examples=40, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck), database=None
    )
    run_state_machine_as_test(Traffic, settings=quiet)
    assert Traffic.reused > 0  # of hundreds of prompts, most of which begin alike


@pytest.mark.parametrize("rows", [1, 2])
def test_the_most_useful_text_is_kept(tiny: Tiny, rows: int) -> None:
    """With every row in use, the oldest kept text gives way."""
    loop = loop_of(tiny, rows)
    for prompt in (PROMPTS[2], [90, *BASE[:50]], [91, *BASE[:50]]):
        finish(loop, request_of(tiny, prompt))
    assert len(loop.batch.kept) == rows
    assert finish(loop, request_of(tiny, [91, *BASE[:50]])).cached == 50
    assert finish(loop, request_of(tiny, PROMPTS[2])).cached == 0
