"""Whether a service keeps its promises: texts, acceptance, waiting times, cancellation, memory.

    python -m benchmarks.serving.goals BUNDLE --threads 2
    python -m benchmarks.serving.goals BUNDLE --checks texts,cancel --prompts 48

========== ================================================================================================ =========
check      measured                                                                                         goal
========== ================================================================================================ =========
texts      requests whose tokens are not those of their prompt alone, in every mode, among 1 to 16 clients  none
acceptance tokens a round at 8 clients over those at 1, where all rounds draft alike                        0.97-1.03
first      time to the first token of 512 prompt tokens beside 7 texts being written, over that alone       <= 2
           time between the tokens of these texts meanwhile, over that before; 95th percentiles             <= 2.2
cancel     rounds a request takes part in after it was cancelled                                            <= 1
memory     most resident memory in the second half of 10,000 requests, one in five cancelled, over before   <= 1.03
========== ================================================================================================ =========

The schedule verifies less in a batch, so tokens a round fall as clients become more. ``acceptance`` therefore fixes how
much is drafted; what the schedule makes of it is printed beside it. One prompt in two is sampled with a temperature.
``first`` runs the service on the calling thread; with ``--cpu-time --threads 1`` other programs do not count.
The exit code is 1 if a goal is missed.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import math
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles

import psutil

from benchmarks.serving.fronts import on_this_thread
from dspark_export.prompts.sets import SHIPPED, load_sets
from dspark_export.prompts.texts import PLAIN, encode
from dspark_runtime import Bundle, Generation, PhraseOptions, SamplingParams, Service, ServiceOptions
from dspark_runtime.decoding.request import Request
from dspark_runtime.decoding.round import Flight
from dspark_runtime.decoding.statistics import Statistics
from dspark_runtime.processors import this_machine
from dspark_runtime.serving.events import Event, Tokens
from dspark_runtime.serving.handle import Handle
from dspark_runtime.serving.observer import ServiceObserver

CAPACITY = 2048
BESIDE = 7  # texts that are written while another prompt waits for its first token
CANCELLED = 0.2  # of the requests of the memory check
HISTORY = 4096  # contexts that are remembered there: full long before memory is compared


@dataclass(frozen=True)
class Finding:
    """A figure, and the range it should be in; any, where it only explains the others."""

    check: str
    what: str
    value: float
    least: float | None = None
    most: float | None = None

    @property
    def met(self) -> bool:
        """Whether it is in its range."""
        return (self.least is None or self.value >= self.least) and (self.most is None or self.value <= self.most)

    def line(self) -> str:
        """For a person."""
        goals = [f"{sign} {goal:g}" for sign, goal in ((">=", self.least), ("<=", self.most)) if goal is not None]
        verdict = ("met" if self.met else "MISSED") if goals else ""
        return f"{self.check:11}{self.what:72}{self.value:9.3f}  {' and '.join(goals):18}{verdict}"


class Bench:
    """A bundle, prompts for it, and requests of them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        # What one run remembers would make the next one draft better.
        phrases = PhraseOptions(history=0)
        self.bundle = Bundle.open(options.bundle, threads=options.threads, verify_digests=False, phrases=phrases)
        self.prompts = prompts_of(self.bundle, options.sets or list(SHIPPED), options.prompts)
        self.modes = options.modes.split(",") if options.modes else self.bundle.speculation_modes()

    def service(
        self, mode: str, rows: int = 8, observer: ServiceObserver | None = None, reuse: bool = False, history: int = 0
    ) -> Service:
        """A service that has learned nothing."""
        bundle = self.bundle.with_phrases(self.bundle.phrases.fresh(PhraseOptions(history=history)))
        options = ServiceOptions(rows=rows, capacity=CAPACITY, queue=1024, speculate=mode, reuse_prefixes=reuse)
        return bundle.serve(options, observer)

    def ask(self, service: Service, number: int, tokens: int | None = None) -> Generation:
        """The text for prompt ``number``, greedy or sampled."""
        request = service.request(
            self.prompts[number],
            SamplingParams(temperature=0.8 * (number % 2)),
            max_new_tokens=tokens or self.options.max_new_tokens,
            seed=number,
            ignore_eos=True,
        )
        return service.submit(request).result()

    def run(self, service: Service, clients: int, count: int | None = None) -> list[Generation]:
        """Texts of the first ``count`` prompts, or of all, asked for by ``clients`` at a time."""
        numbers = range(count or len(self.prompts))
        with ThreadPoolExecutor(clients) as pool:
            return list(pool.map(lambda number: self.ask(service, number), numbers))


def prompts_of(bundle: Bundle, sets: list[str], count: int) -> list[list[int]]:
    """``count`` different prompts: those of the sets, then parts of them."""
    texts = [item.text for item in load_sets(sets)]
    parts = (text[: len(text) * share // 16] for share in range(16, 3, -1) for text in texts)
    found = [encode(bundle, part) for part in dict.fromkeys(parts)]
    return found[:count]


def texts(bench: Bench) -> Iterator[Finding]:
    """Texts among others are those alone."""
    with bench.service(PLAIN, rows=16) as service:
        alone = [text.tokens for text in bench.run(service, 1)]
    if bench.bundle.rows_are_equal:  # elsewhere a single sequence runs another graph
        params = [SamplingParams(temperature=0.8 * (number % 2)) for number in range(len(alone))]
        made = [
            bench.bundle.generate(
                prompt,
                params[number],
                speculate=PLAIN,
                seed=number,
                max_new_tokens=bench.options.max_new_tokens,
                ignore_eos=True,
            )
            for number, prompt in enumerate(bench.prompts)
        ]
        yield _differing("generate(), one after another", alone, made)
    for mode in bench.modes:
        with bench.service(mode, rows=16) as service:
            for clients in map(int, bench.options.concurrency.split(",")):
                say(f"texts: {mode}, {clients} clients")
                yield _differing(f"{mode}, {clients} clients", alone, bench.run(service, clients))


def _differing(what: str, alone: Sequence[list[int]], found: Sequence[Generation]) -> Finding:
    other = sum(wanted != text.tokens for wanted, text in zip(alone, found, strict=True))
    return Finding("texts", f"{what}: other texts, of {len(alone)}", other, most=0)


def acceptance(bench: Bench) -> Iterator[Finding]:
    """Drafters are as good in a batch as they are alone."""
    for mode in bench.modes:
        if mode == PLAIN:
            continue
        for fixed in (bench.options.draft_length, None):
            totals = {}
            for clients in (1, 8):
                say(f"acceptance: {mode}, {clients} clients, {f'{fixed} drafts' if fixed else 'as scheduled'}")
                with bench.service(mode) as service:
                    service._loop.schedule.fixed = fixed
                    found = bench.run(service, clients, bench.options.requests)
                totals[clients] = Statistics.total([text.stats for text in found])
            yield from _compared(f"{mode}, {fixed} drafts" if fixed else f"{mode}, scheduled", totals, fixed)


def _compared(what: str, totals: dict[int, Statistics], fixed: int | None) -> Iterator[Finding]:
    one, eight = totals[1], totals[8]
    goal = (0.97, 1.03) if fixed else (None, None)
    value = eight.accepted_length / one.accepted_length
    yield Finding("acceptance", f"{what}: tokens a round, 8 clients over 1", value, *goal)
    for clients, total in totals.items():
        figures = {
            "tokens a round": total.accepted_length,
            "drafts verified a round": total.verified / total.rounds,
            "accepted share of them": total.acceptance_rate,
        }
        for name, figure in figures.items():
            yield Finding("acceptance", f"{what}, {clients} clients: {name}", figure)
    for name in sorted(one.per_drafter.keys() & eight.per_drafter.keys()):
        shares = [total.per_drafter[name] for total in (one, eight)]
        rates = [counts.accepted / counts.drafted if counts.drafted else 0.0 for counts in shares]
        if rates[0]:
            yield Finding("acceptance", f"{what}: accepted share of {name}, 8 over 1", rates[1] / rates[0])


def first(bench: Bench) -> Iterator[Finding]:
    """A prompt does not wait long beside others, nor do they wait for it."""
    waits: dict[bool, list[float]] = {True: [], False: []}
    before, meanwhile = list[float](), list[float]()
    mode = "auto" if "auto" in bench.modes else bench.modes[-1]
    long = [token for prompt in bench.prompts for token in prompt][: bench.options.long]
    read = time.thread_time if bench.options.cpu_time else time.perf_counter
    with on_this_thread(read), bench.service(mode) as service:
        for turn in range(bench.options.turns + 1):  # in the first one costs are learned
            say(f"first: turn {turn} of {bench.options.turns}")
            prompt = [long[-1 - turn], *long[1:]]
            alone = _first_token(service, prompt, read)
            arrivals = [list[float]() for _ in range(BESIDE)]
            handles = [
                service.submit(_endless(service, bench.prompts[number % len(bench.prompts)]), _notes(times, read))
                for number, times in enumerate(arrivals)
            ]
            while min(map(len, arrivals)) < 12 and not any(handle.outcome for handle in handles):
                service.turn()
            began = read()
            beside = _first_token(service, prompt, read)
            ended = read()
            for handle in handles:
                handle.cancel()
            service.turn()
            if turn == 0:
                continue
            waits[False].append(alone)
            waits[True].append(beside)
            all_run = max(times[0] for times in arrivals)
            for times in arrivals:
                gaps = list(itertools.pairwise(times))
                before += [later - earlier for earlier, later in gaps if all_run <= earlier and later <= began]
                meanwhile += [later - earlier for earlier, later in gaps if later > began and earlier < ended]
        service.close()
        service.turn()
    for others, times in waits.items():
        what = f"beside {BESIDE} texts" if others else "alone"
        yield Finding("first", f"{mode}: first token of {len(long)} prompt tokens {what}, ms", 1e3 * median(times))
    yield Finding("first", f"{mode}: the same, beside over alone", median(waits[True]) / median(waits[False]), most=2.0)
    slow = [_high(times) for times in (before, meanwhile)]
    yield Finding(
        "first", f"{mode}: between tokens of the others, meanwhile over before, p95", slow[1] / slow[0], most=2.2
    )


def _endless(service: Service, prompt: Sequence[int]) -> Request:
    """As long a text as there may be."""
    return service.request(prompt, max_new_tokens=service.limits.positions - len(prompt), ignore_eos=True)


def _first_token(service: Service, prompt: Sequence[int], read: Callable[[], float]) -> float:
    times = list[float]()
    sent = read()
    service.submit(service.request(prompt, max_new_tokens=1, ignore_eos=True), _notes(times, read))
    while not times:
        service.turn()
    return times[0] - sent


def _notes(times: list[float], read: Callable[[], float]) -> Callable[[Event], None]:
    def listen(event: Event) -> None:
        if isinstance(event, Tokens):
            times.append(read())

    return listen


def _high(values: Sequence[float]) -> float:
    """95th percentile."""
    return quantiles(values, n=20, method="inclusive")[18] if len(values) > 1 else math.nan


class After(ServiceObserver):
    """Counts the rounds that a request takes part in after it was cancelled."""

    def __init__(self) -> None:
        self.rounds: dict[int, int] = {}
        self.lock = threading.Lock()

    def started(self, flight: Flight) -> None:
        """See :class:`Observer`."""
        with self.lock:
            for sequence in flight.sequences:
                if sequence.index in self.rounds:
                    self.rounds[sequence.index] += 1


def cancel(bench: Bench) -> Iterator[Finding]:
    """A cancelled request frees its row at once."""
    numbers, after, waited = random.Random(1), After(), list[float]()
    with bench.service(bench.modes[-1], observer=after) as service:

        def submit() -> Handle:
            return service.submit(_endless(service, numbers.choice(bench.prompts)))

        running = [submit() for _ in range(8)]
        say("cancel")
        for _ in range(bench.options.cancels):
            place = numbers.randrange(len(running))
            handle = running[place]
            while handle.sequence is None or not handle.first_token:
                time.sleep(0.001)
            time.sleep(numbers.random() * 0.05)
            handle.cancel()
            with after.lock:
                after.rounds[handle.sequence.index] = 0
            called = time.monotonic()
            handle.result()
            waited.append(handle.ended - called)
            running[place] = submit()
        for handle in running:
            handle.cancel()
    yield Finding("cancel", f"rounds after the call, most of {len(waited)}", max(after.rounds.values()), most=1)
    yield Finding("cancel", "time until the row is free, median, ms", 1e3 * max(median(waited), 0.0))


def memory(bench: Bench) -> Iterator[Finding]:
    """Nothing grows with the number of requests."""
    count, tokens, numbers, process = bench.options.memory_requests, 8, random.Random(1), psutil.Process()
    asked = [prompt[:40] for prompt in bench.prompts[:50]]
    resident, wrong = list[int](), 0
    with bench.service(bench.modes[-1], reuse=True, history=HISTORY) as service:

        def submit(number: int) -> Handle:
            prompt = asked[number % len(asked)]
            return service.submit(service.request(prompt, max_new_tokens=tokens, ignore_eos=True))

        alone = [submit(number).result().tokens for number in range(len(asked))]
        files = process.num_fds()
        running: list[tuple[int, Handle]] = []
        for number in range(count):
            running.append((number, submit(number)))
            if numbers.random() < CANCELLED:
                numbers.choice(running)[1].cancel()
            if len(running) > 12:
                asked_for, handle = running.pop(0)
                text, wanted = handle.result(), alone[asked_for % len(asked)]
                wrong += text.tokens != (wanted[: len(text.tokens)] if text.finish_reason == "cancelled" else wanted)
            if number % max(count // 40, 1) == 0:
                say(f"memory: {number} of {count} requests")
                gc.collect()
                resident.append(process.memory_info().rss)
        service.drain()
        left = service.stats().running + service._loop.cache.memory.batch - service._loop.free
        ended = service.stats().counts.ended
    half = len(resident) // 2
    yield Finding("memory", f"cancelled, of {count} requests", ended.get("cancelled", 0))
    yield Finding("memory", "wrong texts", wrong, most=0)
    yield Finding("memory", "rows and files that were not given back", left + process.num_fds() - files, most=0)
    yield Finding("memory", "resident at the end, MiB", resident[-1] / 2**20)
    growth = max(resident[half:]) / max(resident[half // 2 : half])
    yield Finding("memory", "resident, second half over the quarter before", growth, most=1.03)


def say(text: str) -> None:
    """Progress."""
    print(text, file=sys.stderr, flush=True)


CHECKS = {check.__name__: check for check in (texts, acceptance, first, cancel, memory)}


def arguments() -> argparse.Namespace:
    """The parsed command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--checks", default=",".join(CHECKS), help="those to run (default: all)")
    parser.add_argument("--modes", help="those of speculate, joined with commas (default: all of the bundle)")
    parser.add_argument("--concurrency", default="1,2,4,8,16", help="clients of the texts")
    parser.add_argument("--prompts", type=int, default=240, help="of the texts")
    parser.add_argument("--requests", type=int, default=50, help="of each run that measures acceptance")
    parser.add_argument("--draft-length", type=int, default=4, help="drafts a round where acceptance is compared")
    parser.add_argument("--long", type=int, default=512, help="tokens of the prompt that waits beside others")
    parser.add_argument("--turns", type=int, default=5, help="times it waits")
    parser.add_argument("--cpu-time", action="store_true", help="measure its waits in CPU time; for one thread")
    parser.add_argument("--cancels", type=int, default=200)
    parser.add_argument("--memory-requests", type=int, default=10_000)
    parser.add_argument("--sets", action="append", help=f"of prompts: {', '.join(SHIPPED)}, or a file (default: all)")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if unknown := set(options.checks.split(",")) - set(CHECKS):
        parser.error(f"no check {', '.join(sorted(unknown))}; there are {', '.join(CHECKS)}")
    return options


def main() -> int:
    """Run the checks and print a line for each figure; 1 if a goal is missed."""
    options = arguments()
    bench, machine = Bench(options), this_machine()
    print(f"{machine.cpu}, {options.threads or machine.physical_cores} threads, {options.bundle}\n")
    findings = []
    for name in options.checks.split(","):
        for finding in CHECKS[name](bench):
            print(finding.line(), flush=True)
            findings.append(finding)
    if options.json is not None:
        rows = [asdict(finding) | {"met": finding.met} for finding in findings]
        options.json.write_text(json.dumps({"machine": vars(machine), "findings": rows}, indent=1), encoding="utf-8")
    return 0 if all(finding.met for finding in findings) else 1


if __name__ == "__main__":
    sys.exit(main())
