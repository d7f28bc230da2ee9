"""Runs all peers on all prompts, alternating."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from benchmarks.peers.apart import Crashed
from benchmarks.peers.protocol import Peer, Timed

_WARM_UP_TOKENS = 8
_PAUSE = 0.05  # seconds between peers: worker threads of the one before go to sleep


@dataclass
class Measured:
    """One peer: its runs by prompt, each with all repeats."""

    peer: Peer
    runs: list[list[Timed]] = field(default_factory=list)

    def speeds(self) -> list[float | None]:
        """Decode tokens per second of each prompt: medians over the repeats."""
        return [_median(run.decode_speed for run in runs) for runs in self.runs]

    def totals(self) -> list[float | None]:
        """New tokens per second of each prompt, prefill included: medians over the repeats."""
        return [_median(run.total_speed for run in runs) for runs in self.runs]

    def prefill_ms(self) -> float:
        """Milliseconds to the first token: median over everything."""
        return 1e3 * statistics.median(run.prefill for runs in self.runs for run in runs)

    def tokens(self, prompt: int) -> tuple[int, ...]:
        """The text of the first repeat."""
        return self.runs[prompt][0].tokens


def measure(
    peers: Sequence[Peer],
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    repeats: int,
    on_step: Callable[[], None] = lambda: None,
) -> tuple[list[Measured], dict[str, str]]:
    """Run every peer on every prompt ``repeats`` times. Within a prompt the peers take turns, another one begins each
    time; ``on_step`` is called after every run. Returns results, and why other peers have none: they crashed."""
    results = [Measured(peer, [[] for _ in prompts]) for peer in peers]
    crashed: dict[str, str] = {}

    def run(result: Measured, prompt: Sequence[int], tokens: int) -> Timed | None:
        if result.peer.name in crashed:
            return None
        try:
            return result.peer.generate(prompt, tokens)
        except Crashed as reason:
            crashed[result.peer.name] = str(reason)
            return None

    for result in results:
        run(result, prompts[0], _WARM_UP_TOKENS)
    turn = 0
    for _ in range(repeats):
        for index, prompt in enumerate(prompts):
            start = turn % max(1, len(results))
            for result in (*results[start:], *results[:start]):
                time.sleep(_PAUSE)
                timed = run(result, prompt, max_new_tokens)
                if timed is not None:
                    result.runs[index].append(timed)
                on_step()
            turn += 1
    return [result for result in results if result.peer.name not in crashed], crashed


def ratios(own: Measured, other: Measured) -> list[float]:
    """Decode speed of ``own`` over that of ``other``, per prompt."""
    pairs = zip(own.speeds(), other.speeds(), strict=True)
    return [mine / theirs for mine, theirs in pairs if mine and theirs]


def own_results(results: Iterable[Measured], family: str) -> dict[str, Measured]:
    """This project's results for one family of precisions, by setting."""
    own = [(result.peer.setting, result) for result in results if result.peer.family == family]
    return {setting: result for setting, result in own if setting is not None}


def fastest_own(results: Iterable[Measured]) -> Measured | None:
    """This project in the precision and setting that decodes fastest over all prompts."""
    own = [result for result in results if result.peer.setting is not None]
    return max(own, key=lambda result: geometric_mean(result.speeds()) or 0.0, default=None)


def geometric_mean(values: Iterable[float | None]) -> float | None:
    """Of those that are there."""
    logs = [math.log(value) for value in values if value]
    return math.exp(statistics.fmean(logs)) if logs else None


def shared_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """Tokens before the first difference."""
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
