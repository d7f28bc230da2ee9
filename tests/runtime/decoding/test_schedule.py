"""The schedule: what it chooses, and that its mistakes stay cheap."""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_runtime.decoding.acceptance import OTHER, SILENT, Acceptance, word
from dspark_runtime.decoding.schedule import HOST_MS, Schedule
from dspark_runtime.drafters.base import Draft, Drafter, DraftRequest
from dspark_runtime.drafters.proposal import Proposal
from dspark_runtime.speculation.costs import PassCosts, measure_pass_ms
from dspark_runtime.speculation.tree import TokenTree
from dspark_runtime.speculation.verify import verify_tree
from tests.runtime.conftest import Tiny
from tests.runtime.speculation.test_costs import FLAT, STEEP, Truth, machine


class Guess(Drafter):
    """Drafts chains of one class; each token is right with probability ``skill``."""

    def __init__(self, skill: float, prior: float = 0.5, name: str = "guess", pass_ms: float = 0.0) -> None:
        self.skill, self._prior, self.name, self.pass_ms = skill, prior, name, pass_ms

    def prior(self, kind: Hashable) -> float:
        return self._prior

    def draft(self, request: DraftRequest) -> Sequence[int]:
        return [1] * request.limit


class World:
    """A simulated target: passes take what a cost table says, drafts are right by chance."""

    def __init__(self, truth: dict[int, float], believed: dict[int, float], drafter: Guess, seed: int = 0) -> None:
        self.truth, self.drafter = PassCosts(truth), drafter
        self.schedule = Schedule(PassCosts(believed))
        self._random = random.Random(seed)
        self.ms = self.drafted = 0.0
        self.tokens = 0

    def run(self, rounds: int, length: int = 15) -> World:
        for _ in range(rounds):
            proposal = Proposal.empty(0, 9)
            proposal.add(self.drafter, Draft(TokenTree.chain(9, [1] * length), [0] * length))
            tree = self.schedule.choose([proposal], 1)[0]
            emitted: list[int] = []
            while len(emitted) < len(tree):
                right = self._random.random() < self.drafter.skill
                emitted.append(1 if right else 2)
                if not right:
                    break
            verdict = verify_tree(tree, ROWS, lambda _, at, e=emitted: e[at - 1], 0)  # type: ignore[misc]
            cost = self.truth.ms(len(tree)) * self._random.uniform(0.97, 1.05)
            self.schedule.acceptance.learn(self.drafter, proposal.parts[0].draft, verdict.tokens, 0)
            self.schedule.observe(1, len(tree), len(verdict.tokens), cost, cost + HOST_MS)
            self.ms += cost + HOST_MS
            self.tokens += len(verdict.tokens)
            self.drafted += len(tree) - 1
        return self

    @property
    def speed_up(self) -> float:
        return self.tokens * (self.truth.ms(1) * 1.01 + HOST_MS) / self.ms


def seasoned(table: dict[int, float], *batches: int) -> Schedule:
    """A schedule that has seen a plain round of each batch size."""
    schedule = Schedule(PassCosts(table))
    for batch in batches or (1,):
        ms = schedule.costs.ms(batch, batch)
        schedule.observe(batch, 1, batch, ms, ms + HOST_MS)
    return schedule


ROWS = [[float(row)] for row in range(300)]


@pytest.mark.parametrize("table", [FLAT, STEEP], ids=["flat", "steep"])
@pytest.mark.parametrize("skill", [0.0, 0.05, 0.2, 0.5, 0.8, 0.97])
@pytest.mark.parametrize("prior", [0.1, 0.9])
def test_never_much_slower_than_plain_and_near_the_best_fixed_length(
    table: dict[int, float], skill: float, prior: float
) -> None:
    world = World(table, table, Guess(skill, prior)).run(600)
    costs = PassCosts(table)
    best = max(sum(skill**k for k in range(n + 1)) * costs.ms(1) / costs.ms(n + 1) for n in range(16))
    assert world.speed_up > 0.97
    assert world.speed_up > 0.9 * best


@pytest.mark.parametrize("skill", [0.0, 0.1, 0.3])
def test_wrong_costs_are_found_out(skill: float) -> None:
    """Passes believed to be flat are steep: what that costs is bounded."""
    assert World(STEEP, FLAT, Guess(skill, 0.9)).run(500).speed_up > 0.97


def test_a_drafter_that_becomes_good_is_noticed_without_verifying() -> None:
    drafter = Guess(0.0, 0.02)
    world = World(STEEP, STEEP, drafter).run(200)
    assert world.drafted < 40
    drafter.skill = 0.95
    world.tokens, world.ms = 0, 0.0
    assert world.run(200).speed_up > 2.0


def test_a_tree_is_cut_where_it_stops_paying() -> None:
    schedule = seasoned(FLAT)
    tree = TokenTree.from_paths(9, [[1, 2, 3, 4], [5, 6]])
    rates = {0: 0.9, 1: 0.9, 2: 0.01}
    sure_then_not = Draft(tree, [0, 1, 2, 2, 2, 2])

    class Classes(Guess):
        def prior(self, kind: Hashable) -> float:
            return rates[kind]  # type: ignore[index]

    proposal = Proposal.empty(0, 9)
    proposal.add(Classes(0.5), sure_then_not)
    assert schedule.choose([proposal], 1)[0] == TokenTree.chain(9, [1, 2])
    assert Schedule(PassCosts(FLAT), fixed=0).choose([proposal], 1)[0] == TokenTree.chain(9, [])
    assert Schedule(PassCosts(FLAT), fixed=99).choose([proposal], 1)[0] == tree


def test_a_batch_is_cut_together() -> None:
    schedule = seasoned(STEEP, 1, 4)
    good, bad = Guess(1.0, 0.97, "good"), Guess(0.0, 0.01, "bad")
    proposals = []
    for drafter in (good, bad, bad, bad):
        proposal = Proposal.empty(len(proposals), 9)
        proposal.add(drafter, Draft(TokenTree.chain(9, [1] * 8)))
        proposals.append(proposal)
    alone = schedule.choose(proposals[:1], 1)
    together = schedule.choose(proposals, 4)
    assert len(together[0]) < len(alone[0])  # rows that only pad the other sequences are paid for too


def test_chains_drawn_at_random_are_cut_by_depth_only() -> None:
    import numpy as np

    acceptance = Acceptance()
    drafter = Guess(0.5)
    probs = np.full((2, 4), 0.25, np.float32)
    draft = Draft(TokenTree.chain(9, [1, 2]), ["sure", "unsure"], probs)
    acceptance.learn(drafter, draft, [1, 3], 0)
    assert acceptance.rate(drafter, 1, 0) > 0.5 > acceptance.rate(drafter, 2, 0)
    assert acceptance.rate(drafter, "sure", 0) == 0.5


def test_a_slow_drafter_is_used_only_where_it_pays() -> None:
    schedule = seasoned(FLAT)
    empty = Proposal.empty(0, 9)
    assert schedule.worth_drafting(Guess(1, 0.9, "cheap", 1.0), [0], [empty], [15], 1)[0] >= 4
    dear = Guess(1, 0.6, "dear", 18.0)
    tries = [schedule.worth_drafting(dear, [0], [empty], [15], 1)[0] for _ in range(1000)]
    assert tries[0] == 1 and 4 <= sum(tries) <= 7  # half a percent of the time
    full = Proposal.empty(0, 9)
    full.add(Guess(1, 0.97, "free"), Draft(TokenTree.chain(9, [1] * 15)))
    assert schedule.worth_drafting(Guess(1, 0.8, "cheap", 2.0), [0], [full], [15], 1) == [0]  # it drafted just now
    assert 0 < schedule.floor(Guess(1, 0.9, "cheap", 1.0), 1) < 0.2


class OnePass(Guess):
    """Drafts any number of tokens in one pass."""

    def draft_ms(self, tokens: int) -> float:
        return self.pass_ms


def test_all_sequences_decide_together_whether_to_draft() -> None:
    """One that gains a lot does not make three pay that gain nothing; four that gain something do draft."""
    schedule = seasoned(STEEP, 1, 4)
    drafter = OnePass(1, 0.0, "draft", 6.0)
    for request, skill in enumerate((1.0, 0.0, 0.0, 0.0)):
        for _ in range(40):
            draft = Draft(TokenTree.chain(9, [1] * 8), [0] * 8)
            schedule.acceptance.learn(drafter, draft, [1] * 9 if skill else [2], request)
    empty = [Proposal.empty(request, 9) for request in range(4)]
    schedule.worth_drafting(drafter, [1], empty[1:2], [15], 1)  # the one try it always has
    assert schedule.worth_drafting(drafter, [0], empty[:1], [15], 1)[0] > 0
    assert schedule.worth_drafting(drafter, [0, 1, 2, 3], empty, [15] * 4, 4) == [0] * 4
    assert min(schedule.worth_drafting(drafter, [0] * 4, empty, [15] * 4, 4)) > 0
    lengths = schedule.worth_drafting(drafter, [0] * 4, empty, [15, 2, 15, 15], 4)
    assert lengths[1] == 2 and lengths[0] == lengths[2] == lengths[3] > 2


def test_a_drafter_that_adds_nothing_is_left_alone() -> None:
    """Every second round a free drafter proposes already what the dear one would; in the others nothing is proposed."""
    schedule, random_ = seasoned(FLAT), random.Random(5)
    free, dear = Guess(1, 0.5, "free"), OnePass(1, 0.5, "dear", 3.0)
    draft = Draft(TokenTree.chain(9, [1] * 8), ["x"] * 8)
    asked = [0, 0]
    for round_ in range(400):
        proposal = Proposal.empty(0, 9)
        if round_ % 2:
            proposal.add(free, draft)
        (limit,) = schedule.worth_drafting(dear, [0], [proposal], [8], 1)
        if limit:
            proposal.add(dear, draft)
        if round_ >= 200:
            asked[round_ % 2] += limit > 0
        (tree,) = schedule.choose([proposal], 1)
        right = next((n for n in range(len(tree) - 1) if random_.random() > 0.7), len(tree) - 1)
        emitted = [1] * right + [2]
        schedule.learn(proposal, emitted)
        ms = schedule.costs.ms(len(tree))
        schedule.observe(1, len(tree), len(emitted), ms, ms + HOST_MS + (3.0 if limit else 0.0))
    assert asked[0] > 90 and asked[1] < 20  # a try now and then


@pytest.mark.parametrize("skills", [(0.1,) * 8, (0.9, *(0.05,) * 7), (0.6,) * 4, (0.95,) * 2, (0.95,) * 3])
def test_speculation_costs_little_at_any_concurrency(skills: Sequence[float]) -> None:
    """A simulated batch with a drafter of its own engine: never far below plain decoding, above it where that pays."""
    truth, chance, drafter = PassCosts(STEEP), random.Random(4), OnePass(1, 0.5, "draft", 2.0)
    schedule, batch = Schedule(PassCosts(STEEP)), len(skills)
    spent = plain = 0.0
    for _ in range(700):
        proposals = [Proposal.empty(request, 9) for request in range(batch)]
        limits = schedule.worth_drafting(drafter, range(batch), proposals, [8] * batch, batch)
        draft = Draft(TokenTree.chain(9, [1] * 8), [0] * 8)
        if any(limits):
            for proposal in proposals:
                proposal.add(drafter, draft)
        trees = schedule.choose(proposals, batch)
        emitted = 0
        for request, (skill, tree) in enumerate(zip(skills, trees, strict=True)):
            right = 0
            while right < 8 and chance.random() < skill:
                right += 1
            tokens = [1 if place < right else 2 for place in range(min(right, len(tree) - 1) + 1)]
            emitted += len(tokens)
            if any(limits):
                schedule.acceptance.learn(drafter, draft, tokens, request)
        rows = max(map(len, trees))
        cost = truth.ms(batch * rows) * chance.uniform(0.97, 1.05)
        whole = cost + HOST_MS + (2.0 if any(limits) else 0.0)
        schedule.observe(batch, rows, emitted, cost, whole)
        spent += whole
        plain += emitted / batch * (truth.ms(batch) * 1.01 + HOST_MS)
    assert spent < plain / 0.97
    if min(skills) > 0.9:
        assert spent < plain / 1.3


class CatchingUp(OnePass):
    """Its pass is measured, what it has to read first is not."""

    extra_ms = 0.0


def under_load(
    schedule: Schedule,
    truth: Truth,
    skill: float,
    drafter: CatchingUp,
    clients: int,
    rounds: int = 900,
    seed: int = 7,
    host_ms: float = 1.0,
) -> float:
    """Plain time over time spent, of a batch of up to ``clients`` whose texts end and begin again."""
    chance = random.Random(seed)
    spent = plain = 0.0
    running = [[number, chance.randint(1, 60)] for number in range(clients)]  # request, tokens to come
    away: list[int] = []  # rounds until the next one has its prompt
    number = clients
    for _ in range(rounds):
        away = [left - 1 for left in away]
        for _ in [left for left in away if left <= 0]:
            running.append([number, chance.randint(20, 60)])
            number += 1
        away = [left for left in away if left > 0]
        batch, context = len(running), 300
        if not batch:
            continue
        proposals = [Proposal.empty(request, 9) for request, _ in running]
        limits = schedule.worth_drafting(drafter, [r for r, _ in running], proposals, [7] * batch, batch)
        draft = Draft(TokenTree.chain(9, [1] * 7), [0] * 7)
        if any(limits):
            for proposal in proposals:
                proposal.add(drafter, draft)
        trees = schedule.choose(proposals, batch)
        emitted = 0
        for state, tree in zip(running, trees, strict=True):
            right = 0
            while right < 7 and chance.random() < skill:
                right += 1
            tokens = [1 if place < right else 2 for place in range(min(right, len(tree) - 1) + 1)]
            emitted += len(tokens)
            state[1] -= len(tokens)
            if any(limits):
                schedule.acceptance.learn(drafter, draft, tokens, state[0])
        rows = max(map(len, trees))
        cost = truth(batch * rows, batch, context) * chance.uniform(0.95, 1.08)
        whole = cost + host_ms + (drafter.pass_ms + drafter.extra_ms if any(limits) else 0.0)
        schedule.observe(batch, rows, emitted, cost, whole, context)
        spent += whole
        plain += emitted / batch * (truth(batch, batch, context) * 1.015 + host_ms)
        away += [chance.randint(1, 9) for state in running if state[1] <= 0]
        running = [state for state in running if state[1] > 0]
    return plain / spent


@pytest.mark.parametrize("clients", [1, 2, 4, 8])
@pytest.mark.parametrize("skill", [0.05, 0.3, 0.5, 0.7])
@pytest.mark.parametrize(
    ("table", "believed"), [(FLAT, FLAT), (STEEP, STEEP), (STEEP, FLAT)], ids=["flat", "steep", "wrong"]
)
def test_speculation_costs_little_while_texts_come_and_go(
    table: dict[int, float], believed: dict[int, float], skill: float, clients: int
) -> None:
    """Neither the batch's size nor what drafting hides from its measured pass makes it lose much."""
    drafter = CatchingUp(skill, 0.5, "draft", 2.0)
    drafter.extra_ms = 3.0
    truth = machine(table, 1.4, 0.003, 0.3)
    ratio = under_load(Schedule(PassCosts(believed)), truth, skill, drafter, clients)
    assert ratio > 0.97


def test_drafters_of_a_batch_rest_while_nothing_pays() -> None:
    schedule = seasoned(STEEP, 1, 4)

    def rounds(number: int, batch: int, rows: int = 1) -> list[bool]:
        asked = []
        for _ in range(number):
            asked.append(not schedule.resting(batch))
            ms = schedule.costs.ms(batch * rows, batch)
            schedule.observe(batch, rows, batch, ms, ms + HOST_MS)
        return asked

    assert all(rounds(15, 4))  # and the one that seasoned it
    assert rounds(8, 4) == [True, False, False, False] * 2
    rounds(1, 4, rows=3)  # something was worth verifying
    assert all(rounds(16, 4)) and not all(rounds(8, 4))
    assert all(rounds(40, 1))
    fixed = Schedule(PassCosts(STEEP), fixed=3)
    for _ in range(40):
        fixed.observe(4, 1, 4, 10.0, 10.1)
        assert not fixed.resting(4)


def test_costs_between_and_beyond_the_measured_rows() -> None:
    costs = PassCosts({1: 10.0, 3: 14.0, 4: 16.0})
    assert [costs.ms(n) for n in (1, 2, 3, 4)] == [10, 12, 14, 16]
    assert costs.ms(5) == pytest.approx(18.0)
    assert costs.ms(300) > costs.ms(100)
    slower = PassCosts({1: 10.0, 8: 20.0})
    for _ in range(40):
        slower.observe(1, 30.0, True)
    assert slower.ms(1) == pytest.approx(30, rel=0.02)
    assert slower.ms(8) == pytest.approx(60, rel=0.3)
    slower.observe(1, 0.0, True)
    slower.observe(1, 1e9, True)
    assert slower.ms(1) < 40
    assert PassCosts().ms(1) > 0


def test_costs_can_be_measured(tiny: Tiny) -> None:
    costs = measure_pass_ms(tiny.target, (1, 4), context=16, repeats=2)
    assert sorted(costs) == [1, 4]
    assert all(ms > 0 for ms in costs.values())


def test_exact_quantized_passes_hold_chains_only() -> None:
    tree = TokenTree([1, 2, 3, 4, 5, 6], [-1, 0, 0, 1, 2, 4])
    proposal = Proposal.empty(0, 1)
    proposal.add(Guess(0.5, 0.5), Draft(tree, ["low", "high", "low", "high", "high"]))
    schedule = Schedule(PassCosts(FLAT), fixed=5, chains=True)
    schedule.acceptance.rate = lambda drafter, kind, request: {"low": 0.2, "high": 0.9}[kind]  # type: ignore[method-assign]
    (chosen,) = schedule.choose([proposal], 1)
    assert chosen == TokenTree.chain(1, [3, 5, 6])


def test_drafters_that_agree_are_believed_together() -> None:
    """Each of two drafters is right half of the time, and a token that both propose nine times in ten."""
    schedule, random_ = Schedule(PassCosts(FLAT)), random.Random(3)
    one, two = Guess(0.5, name="one"), Guess(0.5, name="two")

    def proposed(first: int, second: int) -> Proposal:
        proposal = Proposal.empty(0, 9)
        proposal.add(one, Draft(TokenTree.chain(9, [first]), ["a"]))
        proposal.add(two, Draft(TokenTree.chain(9, [second]), ["b"]))
        return proposal

    for _ in range(1600):
        agree = random_.random() < 0.5
        came = 1 if random_.random() < (0.9 if agree else 0.2) else 7
        proposal = proposed(1, 1 if agree else 2)
        schedule.choose([proposal], 1)
        schedule.learn(proposal, [came])
    both, apart = (schedule._ranked(proposed(1, second))[1] for second in (1, 2))
    assert both[0] == pytest.approx(0.9, abs=0.06)
    assert max(apart) < 0.35
    assert schedule.acceptance.rate(one, "a", 0) == pytest.approx(0.55, abs=0.12)


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=4), min_size=1, max_size=4))
def test_what_is_said_of_merged_rows(chains: list[list[int]]) -> None:
    """For every row: what each drafter that proposes it estimates, and of the others whether they propose another."""
    schedule, proposal = Schedule(PassCosts(FLAT)), Proposal.empty(0, 9)
    drafters = [Guess(0.5, prior=0.15 + 0.1 * i, name=f"guess {i}") for i in range(len(chains))]
    for drafter, chain in zip(drafters, chains, strict=True):
        proposal.add(drafter, Draft(TokenTree.chain(9, chain), ["x"] * len(chain)))
    schedule._ranked(proposal)
    if len(chains) == 1:
        assert proposal.said == []
        return
    for row in range(1, len(proposal.tree)):
        path = [proposal.tree.tokens[place] for place in proposal.tree.path(row)][1:]
        sure = [
            drafter.prior("x") for chain, drafter in zip(chains, drafters, strict=True) if chain[: len(path)] == path
        ]
        assert proposal.surest[row] == max(sure)
        for chain, drafter, said in zip(chains, drafters, proposal.said[row], strict=True):
            if chain[: len(path)] == path:
                assert said == word(drafter.prior("x"))
            elif chain[: len(path) - 1] == path[:-1] and len(chain) >= len(path):
                assert said == OTHER
            else:
                assert said == SILENT
