"""Puts load on a server, either a fixed number of requests at a time or random arrivals, and records the results."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import quantiles
from typing import Any, Protocol


@dataclass
class Answer:
    """One answered request. Times are in seconds: when it was sent, when each part of its text came, and its tokens."""

    prompt: int
    sent: float
    arrivals: list[float] = field(default_factory=list)
    tokens: int = 0
    text: tuple[int, ...] | str = ""
    failed: str = ""

    @property
    def first(self) -> float:
        """Seconds to the first token."""
        return self.arrivals[0] - self.sent

    def gaps(self) -> Iterator[float]:
        """Seconds between parts of the text."""
        for before, after in zip(self.arrivals[:-1], self.arrivals[1:], strict=True):
            yield after - before


class Front(Protocol):
    """Something that answers prompts; :meth:`ask` is called by many threads."""

    name: str

    def ask(self, number: int) -> Answer:
        """Send prompt ``number`` and wait for its text."""

    def counters(self) -> dict[str, float]:
        """Figures of its own that grow: tokens of rounds, seconds of rounds, drafts; empty where it tells none."""

    def close(self) -> None:
        """Stop it."""


@dataclass
class Result:
    """What a load measured: rates per second, times in seconds at the 50th and the 95th percentile.

    ``cpu_ms_per_token``: of the server's process, prompts included; 0 where it is not known. ``chunks``: parts that
    texts came in.
    """

    front: str
    concurrency: int
    requests: int
    failed: int
    seconds: float
    tokens_per_second: float
    decode_tokens_per_second: float
    first_token: tuple[float, float]
    between: tuple[float, float]
    accepted_length: float
    cpu_ms_per_token: float
    chunks: int = 0
    texts: dict[int, Any] = field(default_factory=dict, repr=False)

    def row(self) -> dict[str, Any]:
        """Ready for JSON, without the texts."""
        return {name: value for name, value in vars(self).items() if name != "texts"}


def closed_loop(front: Front, prompts: Sequence[int], concurrency: int) -> Result:
    """``concurrency`` clients; each sends its next request when its last one is answered."""
    coming, lock = iter(prompts), threading.Lock()
    answers: list[Answer] = []

    def client() -> None:
        while True:
            with lock:
                number = next(coming, None)
            if number is None:
                return
            answer = front.ask(number)
            with lock:
                answers.append(answer)

    return _measured(front, concurrency, answers, [client] * concurrency)


def poisson(front: Front, prompts: Sequence[int], rate: float, seed: int) -> Result:
    """Requests arrive independently of each other, ``rate`` a second on average."""
    numbers, due = random.Random(seed), 0.0
    answers: list[Answer] = []

    def at(delay: float, number: int) -> Callable[[], None]:
        def client() -> None:
            time.sleep(delay)
            answers.append(front.ask(number))

        return client

    clients = []
    for number in prompts:
        due += numbers.expovariate(rate)
        clients.append(at(due, number))
    return _measured(front, 0, answers, clients)


def _measured(front: Front, concurrency: int, answers: list[Answer], clients: Sequence[Callable[[], None]]) -> Result:
    before, began = front.counters(), time.perf_counter()
    threads = [threading.Thread(target=client) for client in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - began
    counted = {name: value - before.get(name, 0.0) for name, value in front.counters().items()}
    good = [answer for answer in answers if not answer.failed]
    gaps = [gap for answer in good for gap in answer.gaps()]
    round_s = counted.get("round_seconds", 0.0)
    rounds = counted.get("sequence_rounds", 0.0)
    return Result(
        front=front.name,
        concurrency=concurrency,
        requests=len(answers),
        failed=len(answers) - len(good),
        seconds=seconds,
        tokens_per_second=sum(answer.tokens for answer in good) / seconds,
        decode_tokens_per_second=counted.get("round_tokens", 0.0) / round_s if round_s else 0.0,
        first_token=_percentiles([answer.first for answer in good if answer.arrivals]),
        between=_percentiles(gaps),
        accepted_length=counted.get("round_tokens", 0.0) / rounds if rounds else 0.0,
        cpu_ms_per_token=1e3 * counted.get("cpu_seconds", 0.0) / max(sum(answer.tokens for answer in good), 1),
        chunks=sum(len(answer.arrivals) for answer in good),
        texts={answer.prompt: answer.text for answer in good},
    )


def _percentiles(values: Sequence[float]) -> tuple[float, float]:
    if len(values) < 2:
        return (values[0], values[0]) if values else (0.0, 0.0)
    cuts = quantiles(values, n=20, method="inclusive")
    return cuts[9], cuts[18]
