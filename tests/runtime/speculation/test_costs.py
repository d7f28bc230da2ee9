"""What a pass is expected to take, after passes over batches that change."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_runtime.speculation.costs import PassCosts

FLAT = {1: 20.0, 2: 20.4, 4: 21.0, 8: 22.0, 16: 25.0, 32: 40.0, 64: 75.0}
STEEP = {1: 6.3, 2: 7.0, 4: 9.4, 8: 14.8, 16: 25.7, 32: 46.0, 64: 88.0}
Truth = Callable[[int, int, int], float]


def machine(table: dict[int, float], speed: float, slot_ms: float, sequence_ms: float) -> Truth:
    """Times of a machine by rows, sequences and their context."""
    shape = PassCosts(table)

    def ms(rows: int, batch: int, context: int) -> float:
        return speed * (shape.ms(rows) + slot_ms * (batch * context - 256) + sequence_ms * (batch - 1))

    return ms


@settings(max_examples=40, deadline=None)
@given(
    table=st.sampled_from([FLAT, STEEP]),
    believed=st.sampled_from([FLAT, STEEP]),
    speed=st.floats(0.3, 4),
    slot_ms=st.floats(0, 0.01),
    sequence_ms=st.floats(0, 2),
    seed=st.integers(0, 2**31),
)
def test_passes_of_every_batch_are_known_while_batches_come_and_go(
    table: dict[int, float], believed: dict[int, float], speed: float, slot_ms: float, sequence_ms: float, seed: int
) -> None:
    truth, chance = machine(table, speed, slot_ms, sequence_ms), random.Random(seed)
    costs, context = PassCosts(believed), 100
    for _ in range(150):
        batch = chance.choice([1, 2, 3, 4, 8])
        for rows in (1, 1, chance.choice([2, 4])):
            noise = chance.uniform(0.95, 1.05)
            costs.observe(batch * rows, noise * truth(batch * rows, batch, context), rows == 1, batch, context)
        context += 2
    for batch in (1, 2, 3, 4, 8):
        plain = costs.ms(batch, batch)
        assert plain == pytest.approx(truth(batch, batch, context), rel=0.12)
        # What decides is the ratio: whether more rows pay.
        for rows in (2, 4):
            real = truth(batch * rows, batch, context) / truth(batch, batch, context)
            assert costs.ms(batch * rows, batch) / plain == pytest.approx(real, rel=0.3)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 8), st.integers(1, 8), st.floats(-1, 1e7), st.integers(1, 4000), st.booleans()),
        max_size=60,
    )
)
def test_whatever_is_observed_times_are_positive_numbers(passes: list[tuple[int, int, float, int, bool]]) -> None:
    costs = PassCosts(STEEP)
    for batch, rows, ms, context, plain in passes:
        costs.observe(batch * rows, ms, plain, batch, context)
        for other in (1, 2, 8, 64):
            assert 0 < costs.ms(other, other) < math.inf and 0 < costs.ms(4 * other, other) < math.inf


def test_a_hiccup_moves_little() -> None:
    costs = PassCosts(FLAT)
    for batch in (1, 4) * 30:
        costs.observe(batch, 30.0, True, batch, 256)
    costs.observe(4, 3e4, True, 4, 256)
    assert costs.ms(4, 4) < 1.1 * 30 and costs.ms(1, 1) < 1.1 * 30


def test_speculative_passes_move_the_plain_ones_little() -> None:
    costs = PassCosts(FLAT)
    for batch in (1, 4) * 30:
        costs.observe(batch, PassCosts(FLAT).ms(batch), True, batch, 256)
    before = costs.ms(4, 4)
    for _ in range(63):
        costs.observe(16, 60.0, False, 4, 256)
    assert costs.ms(16, 4) == pytest.approx(60, rel=0.05)
    assert costs.ms(4, 4) == pytest.approx(before, rel=0.12)


def test_a_longer_context_costs_more_in_batches_never_seen() -> None:
    truth, costs = machine(FLAT, 1.0, 0.004, 0.0), PassCosts(FLAT)
    for context in range(256, 2048, 8):
        for batch in (1, 2):
            costs.observe(batch, truth(batch, batch, context), True, batch, context)
    assert not costs.knows(6)
    assert costs.ms(6, 6) == pytest.approx(truth(6, 6, 2040), rel=0.2)
