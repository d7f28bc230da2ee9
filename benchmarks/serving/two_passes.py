"""Would it pay to verify a batch in two passes, or in one without padding? From what the schedule of a service sees.

    python -m benchmarks.serving.two_passes BUNDLE --concurrency 2,4,8

In a pass every sequence has as many rows as the longest. Where sequences want very different numbers, two passes need
fewer rows, and read the weights twice. In every round of a real load this compares the tokens a millisecond that are
expected of the best choice of each kind, by the chances that the schedule has learned, and by what passes take by their
rows, which is measured first (in CPU time with ``--threads 1``, so that other programs do not count):

``one``: the pass as it is: the number of rows that is best for all together. ``two``: the sequences that expect most of
their drafts in a pass of their own, if that is better. ``ragged``: one pass whose rows are the most likely of all
sequences, without padding; what such a pass costs beyond its rows is left out, so it is a bound.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from statistics import mean
from unittest.mock import patch

from benchmarks.serving.fronts import ServiceFront
from benchmarks.serving.load import closed_loop
from dspark_export.prompts.sets import SHIPPED, load_sets
from dspark_export.prompts.texts import encode
from dspark_runtime import Bundle
from dspark_runtime.decoding.schedule import HOST_MS, Schedule
from dspark_runtime.drafters.proposal import Proposal
from dspark_runtime.processors import this_machine
from dspark_runtime.speculation.costs import PassCosts, measure_pass_ms
from dspark_runtime.speculation.tree import TokenTree

Values = Sequence[Sequence[float]]
"""For each sequence the chances of its drafts, falling."""


def gain(values: Values, rows: int) -> float:
    """Expected tokens of a round in which each sequence verifies up to ``rows`` drafts."""
    return len(values) + sum(sum(value[:rows]) for value in values)


class Rounds:
    """Tokens a millisecond of the best round of each kind; ``costs`` of passes, by their rows."""

    def __init__(self, costs: PassCosts) -> None:
        self._costs = costs

    def plain(self, values: Values) -> float:
        """Without drafts."""
        return len(values) / (self._pass(values, 0) + HOST_MS)

    def one(self, values: Values) -> float:
        """One pass, of as many rows for each."""
        return max(gain(values, rows) / (self._pass(values, rows) + HOST_MS) for rows in _lengths(values))

    def two(self, values: Values) -> float:
        """Two passes, or one, if that is better."""
        best, ordered = self.one(values), sorted(values, key=sum, reverse=True)
        for size in range(1, len(values)):
            long, short = ordered[:size], ordered[size:]
            for more in _lengths(long):
                for less in range(min(more, len(_lengths(short)))):
                    ms = self._pass(long, more) + self._pass(short, less) + HOST_MS
                    best = max(best, (gain(long, more) + gain(short, less)) / ms)
        return best

    def ragged(self, values: Values) -> float:
        """One pass of the best rows of all."""
        best, found = self.plain(values), float(len(values))
        chances = sorted((chance for value in values for chance in value), reverse=True)
        for rows, chance in enumerate(chances, len(values) + 1):
            found += chance
            best = max(best, found / (self._costs.ms(rows, len(values)) + HOST_MS))
        return best

    def _pass(self, values: Values, drafts: int) -> float:
        return self._costs.ms(len(values) * (drafts + 1), len(values))


def _lengths(values: Values) -> range:
    return range(max(map(len, values)) + 1)


class Recorder:
    """Compares the kinds in every round of a schedule that has something to choose."""

    def __init__(self, schedule: Schedule, rounds: Rounds) -> None:
        self._schedule, self._choose, self._rounds = schedule, schedule.choose, rounds
        self.ratios: dict[int, list[tuple[float, float, float]]] = {}
        schedule.choose = self._recorded  # type: ignore[method-assign]

    def _recorded(self, proposals: Sequence[Proposal], batch: int) -> list[TokenTree]:
        values = [self._schedule._ranked(proposal)[1] for proposal in proposals]
        if batch > 1 and any(values):
            rounds, best = self._rounds, self._rounds.one(values)
            found = best / rounds.plain(values), rounds.two(values) / best, rounds.ragged(values) / best
            self.ratios.setdefault(batch, []).append(found)
        return self._choose(proposals, batch)


def measured(bundle: Bundle, threads: int | None) -> PassCosts:
    """What passes take here."""
    with patch.object(time, "perf_counter", time.thread_time) if threads == 1 else nullcontext():
        found = measure_pass_ms(bundle.engine("target"))
    print("rows: ms  " + ", ".join(f"{rows}: {ms:.1f}" for rows, ms in found.items()) + "\n", flush=True)
    return PassCosts(found)


def main() -> None:
    """Run the loads and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--concurrency", default="2,4,8")
    parser.add_argument("--modes", default="auto")
    parser.add_argument("--requests", type=int, default=48, help="of each load")
    parser.add_argument("--sets", action="append", help=f"of prompts: {', '.join(SHIPPED)}, or a file (default: all)")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    bundle = Bundle.open(options.bundle, threads=options.threads, verify_digests=False)
    prompts = [encode(bundle, item.text) for item in load_sets(options.sets or list(SHIPPED))]
    numbers = [number % len(prompts) for number in range(options.requests)]
    machine = this_machine()
    print(f"{machine.cpu}, {options.threads or machine.physical_cores} threads, {options.bundle}\n")
    rounds = Rounds(measured(bundle, options.threads))
    print("mode                     sequences   rounds  one/plain  two/one  split pays  ragged/one")
    for mode in options.modes.split(","):
        for clients in map(int, options.concurrency.split(",")):
            print(f"{mode}, {clients} clients", file=sys.stderr, flush=True)
            front = ServiceFront(bundle, prompts, options.max_new_tokens, clients, mode)
            recorder = Recorder(front.service._loop.schedule, rounds)
            closed_loop(front, numbers, clients)
            front.close()
            for batch, ratios in sorted(recorder.ratios.items()):
                if batch != clients:
                    continue
                plain, split, packed = (mean(column) for column in zip(*ratios, strict=True))
                pays = mean(ratio > 1.02 for _, ratio, _ in ratios)
                print(
                    f"{mode:25}{batch:9}{len(ratios):9}{plain:11.3f}{split:9.3f}{100 * pays:11.1f}%{packed:12.3f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
