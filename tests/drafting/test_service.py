"""Every trained drafter in a service: rows are used again, prefixes are reused, and acceptance is what it is alone."""

from __future__ import annotations

import pytest

from dspark_runtime import Bundle, ServiceOptions
from dspark_runtime.decoding.statistics import Statistics
from dspark_runtime.serving.handle import Handle
from tests.drafting.conftest import Pairs

PROMPTS = [[(7 * place + 3 * number) % 90 + 5 for place in range(36 + 3 * number)] for number in range(5)]
LONGER = [[*PROMPTS[0], *[11 + number] * (number + 1)] for number in range(3)]
TOKENS = 24


def modes(pairs: Pairs) -> list[str]:
    return [
        mode
        for mode in pairs.bundle.speculation_modes()
        if mode not in ("off", "auto", "ngram", "store") and "+" not in mode
    ]


@pytest.fixture(scope="module")
def opened(pairs: Pairs) -> Bundle:
    """Prefixes are reused wherever exactness is not promised by padding rows."""
    return Bundle.open(pairs.bundle.files.root, threads=1, exact=False)


@pytest.mark.parametrize("place", range(5))
def test_texts_and_acceptance_are_those_alone(opened: Bundle, pairs: Pairs, place: int) -> None:
    bundle = opened.with_fresh_schedule()
    mode = modes(pairs)[place]
    wanted = [*PROMPTS, *LONGER]
    alone = [bundle.generate(p, speculate=mode, draft_length=4, max_new_tokens=TOKENS, ignore_eos=True) for p in wanted]
    plain = bundle.generate(wanted, speculate="off", max_new_tokens=TOKENS, ignore_eos=True)
    assert [g.tokens for g in alone] == [g.tokens for g in plain]
    options = ServiceOptions(rows=3, capacity=128, chunk=16, speculate=mode)
    with bundle.serve(options) as service:
        service._loop.schedule.fixed = 4

        def submit(number: int) -> Handle:
            return service.submit(service.request(wanted[number], max_new_tokens=TOKENS, ignore_eos=True))

        first = [submit(number) for number in range(5)]
        found = [handle.result(120) for handle in first]
        found += [handle.result(120) for handle in [submit(number) for number in range(5, 8)]]
    assert [g.tokens for g in found] == [g.tokens for g in plain]
    for number, (one, other) in enumerate(zip(found, alone, strict=True)):
        assert (one.stats.verified, one.stats.accepted) == (other.stats.verified, other.stats.accepted), number
    assert max(g.cached_tokens for g in found[5:]) >= 32
    assert Statistics.total([g.stats for g in found]).verified > 0


def test_there_is_a_drafter_for_every_place(pairs: Pairs) -> None:
    assert len(modes(pairs)) == 5
