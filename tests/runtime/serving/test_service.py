"""Requests of many threads: every one ends once, and its text is the one it has alone."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from dspark_runtime.decoding.loop import DecodingLoop, LoopOptions
from dspark_runtime.decoding.request import Limits
from dspark_runtime.drafters.base import Drafter
from dspark_runtime.drafters.ngram import NgramDrafter
from dspark_runtime.drafters.self_draft import SelfDrafter
from dspark_runtime.errors import (
    BackendError,
    CapacityError,
    DeadlineExceeded,
    DsparkError,
    Overloaded,
    ServiceStopped,
    ServiceUnhealthy,
    UsageError,
)
from dspark_runtime.serving.events import Event, Failed, Finished, Started, Tokens
from dspark_runtime.serving.handle import Handle
from dspark_runtime.serving.observer import ServiceObserver
from dspark_runtime.serving.options import ServiceOptions
from dspark_runtime.serving.service import Service
from dspark_runtime.speculation.sampling import SamplingParams
from tests.runtime.conftest import Tiny
from tests.runtime.decoding.test_loop import PROMPTS, SAMPLED

CAPACITY = 96
Drafters = Callable[[], list[Drafter]]


@contextmanager
def served(
    tiny: Tiny,
    drafters: Drafters = list,
    *,
    rows: int = 3,
    queue: int = 64,
    threaded: bool = True,
    observer: ServiceObserver | None = None,
    wrap: Callable[[DecodingLoop], DecodingLoop] = lambda loop: loop,
) -> Iterator[Service]:
    """A service over the tiny model."""
    observer = observer or ServiceObserver()

    def open_loop() -> DecodingLoop:
        loop_options = LoopOptions(prefill_chunk=16, first_slots=CAPACITY)
        return wrap(tiny.loop(rows, CAPACITY, drafters(), None, loop_options, observer))

    options = ServiceOptions(rows=rows, queue=queue, chunk=6)
    limits = Limits(tiny.vocab_size, CAPACITY)
    with Service(open_loop, options, limits, observer=observer, threaded=threaded) as service:
        yield service


class Log:
    """Collects the events of one request, and checks their order."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.over = threading.Event()

    def __call__(self, event: Event) -> None:
        assert not self.over.is_set(), f"{event} after the last event"
        assert isinstance(event, Started) == (not self.events) or isinstance(event, Failed | Finished)
        self.events.append(event)
        if isinstance(event, Finished | Failed):
            self.over.set()

    @property
    def tokens(self) -> list[int]:
        return [token for event in self.events if isinstance(event, Tokens) for token in event.chunk.tokens]

    @property
    def text(self) -> str:
        return "".join(event.chunk.text for event in self.events if isinstance(event, Tokens))


def until_idle(service: Service) -> None:
    """Run a service without a thread until nothing is left to do."""
    while service.stats().running or service.stats().waiting:
        assert service.turn()


MODES: dict[str, Callable[[Tiny], Drafters]] = {
    "plain": lambda tiny: list,
    "ngram": lambda tiny: lambda: [NgramDrafter()],
    "merged": lambda tiny: lambda: [NgramDrafter(), SelfDrafter(tiny.self_few, pass_ms=0.01)],
}


@pytest.mark.parametrize("mode", MODES)
def test_requests_of_many_threads_have_the_texts_they_have_alone(tiny: Tiny, mode: str) -> None:
    random_numbers = random.Random(5)
    wanted = []
    for number in range(36):
        prompt = [*PROMPTS[number % len(PROMPTS)], *[number % 7] * (number % 3)]
        params = SAMPLED if number % 2 else SamplingParams()
        wanted.append((prompt, params, random_numbers.randint(1, 24), number))
    expected = [
        tiny.generate([prompt], params=params, tokens=tokens, seed=seed)[0] for prompt, params, tokens, seed in wanted
    ]
    found: dict[int, Log] = {}
    with served(tiny, MODES[mode](tiny)) as service:

        def send(part: Sequence[int]) -> None:
            for number in part:
                prompt, params, tokens, seed = wanted[number]
                log = found[number] = Log()
                request = service.request(prompt, params, max_new_tokens=tokens, seed=seed)
                handle = service.submit(request, log, priority=number % 4)
                if number % 5 == 4:
                    handle.cancel()
                elif number % 3 == 0:
                    handle.result(60)

        threads = [threading.Thread(target=send, args=(range(first, 36, 4),)) for first in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert service.drain(60)
        counts = service.stats().counts
    assert counts.accepted == sum(counts.ended.values()) == 36
    for number, log in found.items():
        last = log.events[-1]
        assert isinstance(last, Finished)
        generation = last.generation
        assert log.tokens == generation.tokens and log.text == generation.text
        if generation.finish_reason == "cancelled":
            assert number % 5 == 4
            assert generation.tokens == expected[number].tokens[: len(generation.tokens)]
        else:
            assert (generation.tokens, generation.text) == (expected[number].tokens, expected[number].text)


def test_the_most_urgent_request_is_next(tiny: Tiny) -> None:
    with served(tiny, rows=1, threaded=False) as service:
        handles = []
        for priority in (0, 3, 3, 9):
            handles.append(service.submit(service.request(PROMPTS[0], max_new_tokens=2), priority=priority))
        until_idle(service)
        assert sorted(range(4), key=lambda n: handles[n].admitted) == [3, 1, 2, 0]


def test_a_text_waits_for_one_chunk_of_a_prompt_at_most(tiny: Tiny) -> None:
    """Chunks of prompts and rounds take turns."""
    steps: list[bool] = []

    class Steps(ServiceObserver):
        def stepped(self, prompt: bool, seconds: float) -> None:
            steps.append(prompt)

    with served(tiny, threaded=False, observer=Steps()) as service:
        first = service.submit(service.request(PROMPTS[0], max_new_tokens=60))
        while not first.first_token:
            service.turn()
        for _ in range(2):
            service.submit(service.request([5] * 40, max_new_tokens=4))
        del steps[:]
        until_idle(service)
    last_chunk = max(number for number, prompt in enumerate(steps) if prompt)
    assert sum(steps) >= 80 // 16
    assert not any(one and following for one, following in itertools.pairwise(steps[: last_chunk + 1]))


def test_nothing_is_drafted_for_a_request_that_wants_none(tiny: Tiny) -> None:
    def open_loop() -> DecodingLoop:
        return tiny.loop(2, CAPACITY, [NgramDrafter(), SelfDrafter(tiny.self_few)], 3, LoopOptions(prefill_chunk=16))

    limits = Limits(tiny.vocab_size, CAPACITY)
    with Service(open_loop, ServiceOptions(rows=2, chunk=6), limits, threaded=False) as service:
        modes: list[Any] = ["auto", "off"]
        handles = [service.submit(service.request([4, 5] * 8, max_new_tokens=30, speculate=mode)) for mode in modes]
        until_idle(service)
        drafted, plain = (handle.result(0) for handle in handles)
        assert drafted.tokens == plain.tokens
        assert drafted.stats.verified > 0 == plain.stats.verified == plain.stats.drafted
        with pytest.raises(UsageError, match="speculate='ngram'"):
            service.request([4, 5], speculate="ngram")  # type: ignore[arg-type]


def test_a_full_queue_refuses(tiny: Tiny) -> None:
    with served(tiny, rows=1, queue=2, threaded=False) as service:
        request = service.request(PROMPTS[0], max_new_tokens=3)
        handles = [service.submit(request) for _ in range(3)]  # one has a row to come
        with pytest.raises(Overloaded, match="3 requests wait and 2 may"):
            service.submit(request)
        until_idle(service)
        assert [len(handle.result(0).tokens) for handle in handles] == [3, 3, 3]
        assert service.submit(request).number > handles[-1].number
        assert service.stats().counts.refused == 1
        until_idle(service)


def test_cancelling_frees_the_row_before_the_next_step(tiny: Tiny) -> None:
    with served(tiny, rows=1, threaded=False) as service:
        first, log = Log(), Log()
        handle = service.submit(service.request(PROMPTS[0], max_new_tokens=50), first)
        waiting = service.submit(service.request(PROMPTS[1], max_new_tokens=3), log)
        never = service.submit(service.request(PROMPTS[1], max_new_tokens=3), Log())
        while not handle.first_token:
            service.turn()
        handle.cancel()
        handle.cancel()
        never.cancel()
        service.turn()
        assert handle.outcome is not None and waiting.admitted
        assert handle.result(0).finish_reason == never.result(0).finish_reason == "cancelled"
        assert never.result(0).tokens == [] and not never.admitted
        until_idle(service)
        handle.cancel()  # long over
        service.turn()
        assert log.tokens == tiny.tokens([PROMPTS[1]], tokens=3)[0]


def test_a_deadline_passes_in_the_queue_and_while_running(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("dspark_runtime.serving.service._clock", lambda: now[0])
    with served(tiny, rows=1, threaded=False) as service:
        running = service.submit(service.request(PROMPTS[0], max_new_tokens=50), deadline=5)
        waiting = service.submit(service.request(PROMPTS[0], max_new_tokens=50), deadline=4)
        in_time = service.submit(service.request(PROMPTS[0], max_new_tokens=2), deadline=50)
        for _ in range(4):
            service.turn()
        now[0] += 4.5
        service.turn()
        assert isinstance(waiting.outcome, Failed) and running.outcome is None
        now[0] += 1
        service.turn()
        assert isinstance(running.outcome, Failed)
        assert running.outcome.generation is not None and running.outcome.generation.tokens
        until_idle(service)
        with pytest.raises(DeadlineExceeded):
            running.result(0)
        assert len(in_time.result(0).tokens) == 2
        assert service.stats().counts.ended == {"deadline": 2, "length": 1}


def test_a_listener_that_fails_costs_its_own_request_only(tiny: Tiny) -> None:
    def bad(event: Event) -> None:
        raise RuntimeError("the listener's own fault")

    with served(tiny) as service:
        handle = service.submit(service.request(PROMPTS[0], max_new_tokens=60), bad)
        other = service.submit(service.request(PROMPTS[1], max_new_tokens=20))
        assert other.result(30).tokens == tiny.tokens([PROMPTS[1]], tokens=20)[0]
        assert handle.result(30).finish_reason == "cancelled"


class Breaking:
    """A runner whose pass fails, or gives no numbers for one row, whenever ``what`` says so."""

    def __init__(self, runner: Any, what: Callable[[int], str]) -> None:
        self._runner, self._what, self._passes = runner, what, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def prepare(self, *sizes: int) -> Any:
        self._buffers = self._runner.prepare(*sizes)
        return self._buffers

    def finish(self) -> Any:
        found = self._runner.finish()
        self._passes += 1
        trouble = self._what(self._passes)
        if trouble == "fails":
            raise BackendError("the pass failed")
        if trouble:
            self._buffers.logits[int(trouble)] = np.nan
        return found


def breaking(what: Callable[[int], str]) -> Callable[[DecodingLoop], DecodingLoop]:
    """Wraps the runner of the first loop it sees."""
    seen: list[DecodingLoop] = []

    def wrap(loop: DecodingLoop) -> DecodingLoop:
        if not seen:
            loop.runner = Breaking(loop.runner, what)  # type: ignore[assignment]
        seen.append(loop)
        return loop

    return wrap


def test_a_round_that_fails_ends_its_requests_and_no_others(tiny: Tiny) -> None:
    wrap = breaking(lambda number: "fails" if number == 6 else "")
    with served(tiny, rows=2, threaded=False, wrap=wrap) as service:
        handles = [service.submit(service.request(prompt, max_new_tokens=20)) for prompt in PROMPTS[:4]]
        until_idle(service)
        ended = [isinstance(handle.outcome, Failed) for handle in handles]
        assert ended[:2] == [True, True] and not any(ended[2:])
        for handle, prompt in zip(handles[2:], PROMPTS[2:4], strict=True):
            assert handle.result(0).tokens == tiny.tokens([prompt], tokens=20)[0]
        with pytest.raises(BackendError, match="the pass failed"):
            handles[0].result(0)
        assert service.health == "ready"


def test_a_prompt_that_fails_leaves_the_running_ones_alone(tiny: Tiny) -> None:
    wrap = breaking(lambda number: "fails" if number == 4 else "")
    with served(tiny, rows=2, threaded=False, wrap=wrap) as service:
        first = service.submit(service.request(PROMPTS[0], max_new_tokens=20))
        while not first.first_token:
            service.turn()
        passes = first.sequence.stats.rounds + 1 if first.sequence else 0
        second = service.submit(service.request([7] * 60, max_new_tokens=5))
        until_idle(service)
        assert passes < 4
        outcomes = [first.outcome, second.outcome]
        assert sum(isinstance(outcome, Failed) for outcome in outcomes) == 1
        third = service.submit(service.request(PROMPTS[1], max_new_tokens=9))
        until_idle(service)
        assert third.result(0).tokens == tiny.tokens([PROMPTS[1]], tokens=9)[0]


def test_logits_that_are_no_numbers_end_their_own_request(tiny: Tiny) -> None:
    wrap = breaking(lambda number: "0" if number == 9 else "")
    with served(tiny, rows=3, threaded=False, wrap=wrap) as service:
        handles = [service.submit(service.request(prompt, max_new_tokens=30)) for prompt in PROMPTS[:3]]
        until_idle(service)
        assert sum(isinstance(handle.outcome, Failed) for handle in handles) == 1
        for handle, prompt in zip(handles, PROMPTS[:3], strict=True):
            if isinstance(handle.outcome, Finished):
                assert handle.result(0).tokens == tiny.tokens([prompt], tokens=30)[0]


def test_two_failures_in_a_row_end_the_service(tiny: Tiny) -> None:
    wraps = [breaking(lambda number: "fails" if number > 3 else ""), breaking(lambda number: "fails")]
    with served(tiny, rows=2, threaded=False, wrap=lambda loop: wraps.pop(0)(loop)) as service:
        handles = [service.submit(service.request(prompt, max_new_tokens=30)) for prompt in PROMPTS[:4]]
        while service.turn():
            pass
        assert service.health == "unhealthy"
        assert all(isinstance(handle.outcome, Failed) for handle in handles)
        with pytest.raises(ServiceUnhealthy):
            service.submit(service.request(PROMPTS[0], max_new_tokens=3))


def test_whoever_waits_is_told_when_the_thread_ends(tiny: Tiny) -> None:
    class Bomb(ServiceObserver):
        def committed(self, *_: object) -> None:
            raise KeyError("not one of ours")

    with served(tiny, observer=Bomb()) as service:
        handles = [service.submit(service.request(prompt, max_new_tokens=30), Log()) for prompt in PROMPTS]
        for handle in handles:
            with pytest.raises(ServiceUnhealthy, match="not one of ours"):
                handle.result(30)


def test_draining_and_closing(tiny: Tiny) -> None:
    with served(tiny, rows=1) as service:
        handles = [service.submit(service.request(prompt, max_new_tokens=20)) for prompt in PROMPTS[:3]]
        assert service.drain(60)
        assert all(isinstance(handle.outcome, Finished) for handle in handles)
        with pytest.raises(ServiceStopped, match="draining"):
            service.submit(service.request(PROMPTS[0], max_new_tokens=3))
    assert service.health == "stopped"
    with served(tiny, rows=1) as service:
        handles = [service.submit(service.request(prompt, max_new_tokens=80), Log()) for prompt in PROMPTS[:3]]
        service.close()
        outcomes = [handle.outcome for handle in handles]
        assert all(isinstance(o, Failed) and isinstance(o.error, ServiceStopped) for o in outcomes)
    service.close()


def test_what_is_refused(tiny: Tiny) -> None:
    with served(tiny, threaded=False) as service:
        request = service.request(PROMPTS[0], max_new_tokens=2)
        for wrong in ({"priority": 10}, {"priority": -1}, {"deadline": 0}, {"deadline": "soon"}):
            with pytest.raises(UsageError):
                service.submit(request, **wrong)  # type: ignore[arg-type]
        with pytest.raises(CapacityError):
            service.request(PROMPTS[0], max_new_tokens=CAPACITY)
    for wrong in ({"rows": 0}, {"queue": -1}, {"chunk": 0}, {"capacity": 1}, {"prefill_share": 0}):
        with pytest.raises(UsageError):
            ServiceOptions(**wrong)  # type: ignore[arg-type]


def test_choices_of_one_prompt_differ_and_stay_the_same(tiny: Tiny) -> None:
    with served(tiny) as service:

        def text(choice: int) -> list[int]:
            request = service.request(PROMPTS[0], SAMPLED, max_new_tokens=12, seed=4, choice=choice)
            return service.submit(request).result(30).tokens

        texts = [text(choice) for choice in (0, 1, 2)]
        assert len({tuple(tokens) for tokens in texts}) == 3
        assert [text(choice) for choice in (2, 1, 0)] == texts[::-1]
        together = tiny.tokens([PROMPTS[0]] * 3, params=SAMPLED, tokens=12, seed=4)
        assert texts == together


def test_events_carry_the_drafters_of_every_token(tiny: Tiny) -> None:
    with served(tiny, lambda: [SelfDrafter(tiny.self_all, pass_ms=0.01)]) as service:
        log = Log()
        service.submit(service.request(PROMPTS[0], max_new_tokens=30), log).result(30)
    chunks = [event.chunk for event in log.events if isinstance(event, Tokens)]
    assert all(len(chunk.drafters) == len(chunk.tokens) for chunk in chunks[1:])
    named = [name for chunk in chunks for names in chunk.drafters for name in names]
    last = log.events[-1]
    assert isinstance(last, Finished)
    assert named == ["self-draft"] * last.generation.stats.accepted and named


def test_a_handle_gives_an_error_or_a_text(tiny: Tiny) -> None:
    with served(tiny, threaded=False) as service:
        handle: Handle = service.submit(service.request(PROMPTS[0], max_new_tokens=2))
        with pytest.raises(TimeoutError):
            handle.result(0.01)
        until_idle(service)
        assert handle.result().finish_reason == "length"
        assert issubclass(Overloaded, DsparkError)
