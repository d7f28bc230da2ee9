"""Ten thousand requests, one in five cancelled: nothing grows, nothing leaks, no text is wrong."""

from __future__ import annotations

import gc
import random

import psutil
import pytest

from dspark_runtime.drafters.ngram import NgramDrafter
from dspark_runtime.drafters.self_draft import SelfDrafter
from dspark_runtime.serving.handle import Handle
from dspark_runtime.speculation.sampling import SamplingParams
from tests.runtime.conftest import Tiny
from tests.runtime.decoding.test_loop import PROMPTS, SAMPLED
from tests.runtime.serving.test_service import served

REQUESTS, TOKENS = 10_000, 6


@pytest.mark.slow
def test_memory_stays_flat_and_texts_right(tiny: Tiny) -> None:
    numbers, process = random.Random(1), psutil.Process()
    settings = [SamplingParams(), SAMPLED]
    expected = [[tiny.tokens([p], params=params, tokens=TOKENS, seed=1)[0] for p in PROMPTS] for params in settings]
    resident: list[int] = []
    with served(tiny, lambda: [NgramDrafter(), SelfDrafter(tiny.self_few, pass_ms=0.1)], rows=4) as service:
        running: list[tuple[Handle, list[int], bool]] = []
        for number in range(REQUESTS):
            which, prompt = number % 2, number % len(PROMPTS)
            request = service.request(PROMPTS[prompt], settings[which], max_new_tokens=TOKENS, seed=1)
            handle = service.submit(request, deadline=600)
            gone = numbers.random() < 0.2
            if gone:
                handle.cancel()
            running.append((handle, expected[which][prompt], gone))
            if len(running) > 12:
                handle, tokens, gone = running.pop(0)
                found = handle.result(60)
                assert found.tokens == tokens[: len(found.tokens)]
                assert gone or found.tokens == tokens
            if number % 500 == 0:
                gc.collect()
                resident.append(process.memory_info().rss)
        assert service.drain(60)
        stats = service.stats()
        assert stats.running == stats.waiting == 0
        assert sum(stats.counts.ended.values()) == stats.counts.accepted == REQUESTS
        assert len(service._deadlines) < 200 and not service._loop.schedule.acceptance._own
        assert service._loop.free == 4
    half = len(resident) // 2
    assert max(resident[half:]) < 1.03 * max(resident[3:half]), [value >> 20 for value in resident]
