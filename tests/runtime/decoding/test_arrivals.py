"""Requests join and leave a running loop; no text depends on it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from dspark_runtime.backends.host_features import HostFeatures
from dspark_runtime.backends.ort import HostCache
from dspark_runtime.backends.protocol import CacheMemory, GraphRunner
from dspark_runtime.bundle.contract import CacheLayer
from dspark_runtime.decoding.loop import DecodingLoop, LoopOptions
from dspark_runtime.decoding.request import Limits, Request, make_requests
from dspark_runtime.decoding.sequence import Chunk, SequenceState
from dspark_runtime.drafters.base import Draft, Drafter, DraftRequest
from dspark_runtime.drafters.cached import CachedDrafter
from dspark_runtime.drafters.ngram import NgramDrafter
from dspark_runtime.drafters.self_draft import SelfDrafter
from dspark_runtime.errors import BackendError, CapacityError, UsageError
from dspark_runtime.speculation.kv_cache import KvCache
from dspark_runtime.speculation.sampling import SamplingParams
from tests.runtime.conftest import Tiny
from tests.runtime.decoding.test_loop import PROMPTS, SAMPLED, Sampled, WildTrees, full_texts

TOKENS = 24


def request_of(tiny: Tiny, prompt: Sequence[int], params: SamplingParams, tokens: int = TOKENS) -> Request:
    limits = Limits(tiny.vocab_size, tiny.positions)
    return make_requests([prompt], limits, max_new_tokens=tokens, params=params, seed=3)[0]


def arrive(loop: DecodingLoop, requests: Sequence[Request], every: int, alternate: bool) -> list[SequenceState]:
    """Admit one request every ``every`` steps, when a row is free; all at once for 0."""
    sequences: list[SequenceState] = []
    for number in itertools.count():
        due = len(requests) if every == 0 else number // every + 1
        while loop.free and len(sequences) < min(due, len(requests)):
            sequences.append(loop.admit(requests[len(sequences)]))
        if not loop.busy and len(sequences) == len(requests):
            return sequences
        loop.step(rounds_first=alternate and number % 2 == 0)
    raise AssertionError


@pytest.mark.parametrize("params", [SamplingParams(), SAMPLED], ids=["greedy", "sampled"])
def test_when_a_request_arrives_changes_nothing(tiny: Tiny, params: SamplingParams) -> None:
    alone = [tiny.generate([prompt], params=params, tokens=TOKENS, seed=3)[0] for prompt in PROMPTS]
    modes: dict[str, Callable[[], list[Drafter]]] = {
        "plain": list,
        "merged": lambda: [NgramDrafter(), SelfDrafter(tiny.self_few, pass_ms=1.0)],
        "wild": lambda: [WildTrees(full_texts(alone, PROMPTS))],
    }
    requests = [request_of(tiny, prompt, params) for prompt in PROMPTS]
    options = LoopOptions(prefill_chunk=6)
    for (name, drafters), (rows, every, alternate) in itertools.product(
        modes.items(), [(5, 0, False), (5, 3, True), (2, 1, False), (2, 5, True), (1, 0, False)]
    ):
        loop = tiny.loop(rows, 64, drafters(), None if name == "merged" else 4, options)
        found = [sequence.generation() for sequence in arrive(loop, requests, every, alternate)]
        assert [(g.tokens, g.text) for g in found] == [(g.tokens, g.text) for g in alone], (name, rows, every)


def test_texts_drawn_by_rejection_sampling_are_their_own(tiny: Tiny) -> None:
    """A request with a temperature drafts and verifies alike beside greedy ones, whatever the schedule has measured."""

    class Steady(Sampled):
        steady, pass_ms = True, 50.0  # too slow for any request that may choose

    hot = request_of(tiny, PROMPTS[0], SamplingParams(1.2))
    cold = [request_of(tiny, prompt, SamplingParams()) for prompt in PROMPTS[1:]]
    alone = arrive(tiny.loop(1, 64, [Steady()], None), [hot], 0, False)[0]
    assert alone.stats.verified > 0
    for every in (0, 2):
        beside = arrive(tiny.loop(5, 64, [Steady()], None), [*cold, hot], every, True)
        assert beside[-1].tokens == alone.tokens and beside[-1].stats.verified == alone.stats.verified
        assert [s.generation().tokens for s in beside[:-1]] == tiny.tokens(PROMPTS[1:], tokens=TOKENS)


def test_leaving_does_not_disturb_the_others(tiny: Tiny) -> None:
    expected = tiny.tokens(PROMPTS, tokens=TOKENS)
    requests = [request_of(tiny, prompt, SamplingParams()) for prompt in PROMPTS]
    for steps, gone in itertools.product((0, 1, 4, 9), (0, 2, 4)):
        loop = tiny.loop(5, 64, [NgramDrafter()], options=LoopOptions(prefill_chunk=8))
        sequences = [loop.admit(request) for request in requests]
        for _ in range(steps):
            loop.step()
        last = loop.cancel(sequences[gone])
        assert (last.index, last.tokens, last.finish_reason) == (gone, [], "cancelled")
        while loop.busy:
            assert gone not in [chunk.index for chunk in loop.step()]
        for index, (sequence, tokens) in enumerate(zip(sequences, expected, strict=True)):
            found = sequence.generation()
            assert found.tokens == (tokens[: len(found.tokens)] if index == gone else tokens)
        with pytest.raises(ValueError, match="has ended already"):
            loop.cancel(sequences[gone])


def test_seconds_are_those_of_the_steps_taken_part_in(tiny: Tiny) -> None:
    early, late = (request_of(tiny, PROMPTS[n], SamplingParams(), tokens) for n, tokens in ((0, 30), (1, 4)))
    loop = tiny.loop(2, 64)
    first = loop.admit(early)
    for _ in range(12):
        loop.step()
    before = first.stats.seconds.decode
    second = loop.admit(late)
    while loop.busy:
        loop.step()
    assert 0 < second.stats.seconds.decode < first.stats.seconds.decode
    assert first.stats.seconds.decode >= before + second.stats.seconds.decode
    assert first.stats.seconds.prefill > 0 and second.stats.seconds.prefill > 0


def test_what_cannot_be_admitted(tiny: Tiny) -> None:
    loop = tiny.loop(1, 20)
    with pytest.raises(CapacityError, match="the limit is 20"):
        loop.admit(request_of(tiny, PROMPTS[0], SamplingParams()))
    loop.admit(request_of(tiny, PROMPTS[1], SamplingParams(), 5))
    with pytest.raises(UsageError, match="all 1 rows are taken"):
        loop.admit(request_of(tiny, PROMPTS[1], SamplingParams(), 5))
    loop.close()
    assert loop.free == 1 and not loop.busy and loop.step() == []


class Failing(Drafter):
    """Fails in every third round."""

    name = "failing"
    rounds = 0

    def draft(self, request: DraftRequest) -> Draft | None:
        self.rounds += 1
        if self.rounds % 3 == 0:
            raise BackendError("the drafter failed")
        return None


def test_a_round_that_fails_leaves_the_sequences_where_they_were(tiny: Tiny) -> None:
    loop = tiny.loop(1, 64, [Failing()])
    sequence = loop.admit(request_of(tiny, PROMPTS[0], SamplingParams()))
    failures = 0
    while loop.busy:
        try:
            loop.step()
        except BackendError:
            failures += 1
    assert failures > 5
    assert sequence.generation().tokens == tiny.tokens(PROMPTS[:1], tokens=TOKENS)[0]


class Engine:
    """Cache memory and nothing else."""

    name, slots, most_rows = "engine", None, None

    def allocate(self, batch: int, capacity: int) -> HostCache:
        return HostCache([CacheLayer(kv_heads=1, key_dim=2, value_dim=2)], "float32", batch, capacity)

    def open(self, memory: CacheMemory) -> GraphRunner:
        raise AssertionError


class Remembering(CachedDrafter):
    def _open(self, cache: KvCache, target: CacheMemory) -> None:
        self._features = HostFeatures()

    def draft(self, request: DraftRequest) -> None:
        return None

    def waiting(self, row: int) -> int:
        assert self._features is not None
        return self._features.waiting(row)

    def learn(self, row: int, taken: int, waiting: int) -> None:
        assert self._features is not None
        self.cache.lengths[row] = taken
        self._features.add(row, np.ones((waiting, 4), np.float32))


def test_rows_that_are_used_again_know_nothing_of_the_text_before() -> None:
    drafter = Remembering("remembering", Engine(), 4, 512, None)
    drafter.attach(KvCache(Engine().allocate(3, 64), 64))
    drafter.learn(0, 8, 5)
    drafter.cache.memory.tensors()[0, "key"][0, :, :8] = 7.0  # type: ignore[attr-defined]
    assert drafter.copy(0, 1, 6) == 6 and drafter.copy(0, 2, 20) == 8
    assert drafter.cache.lengths == [8, 6, 8] and [drafter.waiting(row) for row in range(3)] == [5, 0, 0]
    assert (drafter.cache.memory.tensors()[0, "key"][1, 0, :6] == 7.0).all()  # type: ignore[attr-defined]
    assert drafter.keep(0, 3) == 3 and drafter.keep(0, 3) == 3
    assert (drafter.cache.lengths[0], drafter.waiting(0)) == (3, 0)
    drafter.learn(2, 8, 1)
    drafter.reset(2)
    assert (drafter.cache.lengths[2], drafter.waiting(2)) == (0, 0)


class Traffic(RuleBasedStateMachine):
    """Any order of admitting, stepping and cancelling."""

    tiny: Tiny
    alone: dict[tuple[int, bool], list[int]]

    def __init__(self) -> None:
        super().__init__()
        drafters = [NgramDrafter(), SelfDrafter(self.tiny.self_few, pass_ms=1.0)]
        self.loop = self.tiny.loop(3, 64, drafters, 3, LoopOptions(prefill_chunk=10, first_slots=1))
        self.sequences: list[tuple[SequenceState, list[int]]] = []
        self.given: dict[int, list[int]] = {}
        self.ended: set[int] = set()

    @precondition(lambda self: self.loop.free > 0)
    @rule(prompt=st.integers(0, len(PROMPTS) - 1), sampled=st.booleans(), tokens=st.integers(1, 20))
    def admit(self, prompt: int, sampled: bool, tokens: int) -> None:
        params = SAMPLED if sampled else SamplingParams()
        sequence = self.loop.admit(request_of(self.tiny, PROMPTS[prompt], params, tokens))
        self.sequences.append((sequence, self.alone[prompt, sampled][:tokens]))

    @rule(rounds_first=st.booleans(), count=st.integers(1, 4))
    def step(self, rounds_first: bool, count: int) -> None:
        for _ in range(count):
            for chunk in self.loop.step(rounds_first):
                self.take(chunk)

    @rule(which=st.integers(0, 10))
    def cancel(self, which: int) -> None:
        running = [sequence for sequence, _ in self.sequences if not sequence.finished]
        if running:
            self.take(self.loop.cancel(running[which % len(running)]))

    def take(self, chunk: Chunk) -> None:
        assert chunk.index not in self.ended
        self.given.setdefault(chunk.index, []).extend(chunk.tokens)
        if chunk.finish_reason:
            self.ended.add(chunk.index)

    @invariant()
    def rows_and_texts_are_right(self) -> None:
        batch, lengths = self.loop.batch, self.loop.cache.lengths
        assert [sequence.row for sequence in batch.running] == list(range(len(batch.running)))
        assert all(lengths[s.row] == len(s.tokens) - 1 for s in batch.running)
        if batch.filling is not None:
            assert batch.filling.row == len(batch.running)
            assert lengths[batch.filling.row] < len(batch.filling.request.prompt)
        assert len(batch) == sum(not sequence.finished for sequence, _ in self.sequences) <= 3
        for sequence, expected in self.sequences:
            emitted = sequence.tokens[len(sequence.request.prompt) :]
            assert emitted == expected[: len(emitted)] == self.given.get(sequence.index, [])
            if sequence.finished and sequence.generation().finish_reason == "length":
                assert emitted == expected

    def teardown(self) -> None:
        for _ in range(200):
            if not self.loop.busy:
                break
            self.step(False, 1)
        assert {sequence.index for sequence, _ in self.sequences} == self.ended


def test_any_traffic(tiny: Tiny) -> None:
    Traffic.tiny = tiny
    Traffic.alone = {
        (number, sampled): tiny.tokens([prompt], params=SAMPLED if sampled else None, tokens=20, seed=3)[0]
        for number, prompt in enumerate(PROMPTS)
        for sampled in (False, True)
    }
    quiet = settings(
        max_examples=12, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck), database=None
    )
    run_state_machine_as_test(Traffic, settings=quiet)
