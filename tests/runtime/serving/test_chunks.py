"""How prompts and rounds share the time, on machines whose times are known."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_runtime.serving.chunks import FEWEST, ChunkSize, Line

Machine = tuple[float, float, float]  # milliseconds of a chunk beside its tokens, of a token, of a round


def learnt(machine: Machine, most: int = 128) -> ChunkSize:
    """A size that has seen some chunks and rounds."""
    start, token, round_ms = machine
    sizes = ChunkSize(most, 512)
    for count in (128, 30, 64, 128, 17, 90) * 5:
        sizes.observe(count, start + token * count)
        sizes.observe(0, round_ms)
    return sizes


def first_token_ms(sizes: ChunkSize, machine: Machine, prompt: int, running: int) -> tuple[float, float]:
    """Time to the first token of a prompt, and the longest wait of those that run meanwhile."""
    start, token, round_ms = machine
    spent = longest = 0.0
    while prompt > 0:
        count = min(prompt, sizes.tokens(running))
        prompt -= count
        chunk = start + token * count
        sizes.observe(count, chunk)
        sizes.observe(0, round_ms)
        longest = max(longest, chunk + round_ms)
        spent += chunk + (round_ms if prompt else 0.0)
    return spent, longest


@settings(max_examples=60, deadline=None)
@given(st.floats(0, 60), st.floats(0.2, 6), st.floats(1, 3))
def test_a_prompt_beside_others_takes_about_twice_as_long_as_alone(start: float, token: float, rounds: float) -> None:
    machine = (start, token, rounds * (start + token))  # a round takes more than an empty pass
    sizes = learnt(machine, most=512)
    alone = start + 512 * token
    spent, longest = first_token_ms(sizes, machine, 512, running=7)
    assert spent < 2.2 * alone + start + machine[2]
    assert longest < 2.2 * (start + machine[2]) + FEWEST * token  # nobody waits longer than that needs


def test_a_turn_is_bounded_by_the_option() -> None:
    machine = (20.0, 0.5, 40.0)
    assert learnt(machine, most=64).tokens(7) == 64
    assert learnt(machine, most=8).tokens(7) == 8
    assert learnt((1.0, 50.0, 1.0)).tokens(7) == FEWEST
    assert learnt(machine).tokens(0) == 512
    assert ChunkSize(64, 512, fixed=True).tokens(0) == 64


def test_prompts_have_longer_turns_while_more_of_them_wait_than_run() -> None:
    sizes = learnt((5.0, 0.5, 20.0))
    assert sizes.tokens(7, 1) == sizes.tokens(4, 4) == pytest.approx(50, abs=5)
    assert sizes.tokens(3, 4) == sizes.tokens(1, 7) == 128


def test_a_line_of_equal_points_begins_at_zero() -> None:
    line = Line()
    for _ in range(5):
        line.observe(10, 30)
    assert line.start_and_slope(100) == (0.0, 3.0)
    for x in (2, 20, 5, 40) * 30:
        line.observe(x, 7 + 2 * x)
    assert line.start_and_slope(100) == pytest.approx((7, 2), rel=0.01)
    assert line.start_and_slope(5)[0] == 5
