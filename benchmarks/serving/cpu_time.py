"""A service under load in CPU time of one thread: what other programs of the machine take does not count.

    python -m benchmarks.serving.cpu_time BUNDLE --concurrency 1,4,8 --modes off,auto

The service runs on the calling thread, whose clients send their next request as soon as the last one is answered. Every
time, also those the schedule learns from, is CPU time of that thread. Other programs still share caches and memory with
it, so compare figures of one run, in which modes take turns. Texts of all modes have to be equal.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.serving.fronts import Rounds, on_this_thread
from dspark_export.prompts.sets import SHIPPED, load_sets
from dspark_export.prompts.texts import encode
from dspark_runtime import Bundle, ServiceOptions
from dspark_runtime.serving.events import Event, Finished, Tokens

clock = time.thread_time


class Load:
    """A service of one mode on this thread."""

    def __init__(self, bundle: Bundle, mode: str, rows: int, tokens: int) -> None:
        self.mode, self._tokens = mode, tokens
        self._rounds = Rounds()
        options = ServiceOptions(rows=rows, capacity=2048, queue=1024, speculate=mode, reuse_prefixes=False)
        self._service = bundle.serve(options, self._rounds)

    def run(self, prompts: Sequence[Sequence[int]], clients: int) -> dict[str, Any]:
        """Send ``prompts``, ``clients`` at a time."""
        service, before = self._service, dict(self._rounds.totals)
        coming, began = iter(enumerate(prompts)), clock()
        first, gaps, texts = list[float](), list[float](), dict[int, list[int]]()

        def send() -> None:
            number, prompt = next(coming, (-1, ()))
            if number < 0:
                return
            sent, last = clock(), [0.0]

            def listen(event: Event) -> None:
                now = clock()
                if isinstance(event, Tokens):
                    (gaps if last[0] else first).append(now - (last[0] or sent))
                    last[0] = now
                elif isinstance(event, Finished):
                    texts[number] = event.generation.tokens
                    send()

            service.submit(service.request(prompt, max_new_tokens=self._tokens, ignore_eos=True), listen)

        for _ in range(clients):
            send()
        while len(texts) < len(prompts):
            service.turn()
        seconds = clock() - began
        counted = {name: value - before[name] for name, value in self._rounds.totals.items()}
        return {
            "tokens_per_second": len(prompts) * self._tokens / seconds,
            "decode_tokens_per_second": counted["round_tokens"] / counted["round_seconds"],
            "sequences_a_round": counted["sequence_rounds"] / counted["rounds"],
            "tokens_a_round": counted["round_tokens"] / counted["sequence_rounds"],
            "first_ms": 1e3 * median(first),
            "between_ms": 1e3 * median(gaps),
            "texts": texts,
        }


def main() -> None:
    """Run all loads in turns and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--concurrency", default="1,4,8")
    parser.add_argument("--modes", default="off,auto")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--prompts", action="append", help=f"set ({', '.join(SHIPPED)}) or file; default: all sets")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with on_this_thread(clock):
        rows = compare(options)
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


def compare(options: argparse.Namespace) -> list[dict[str, Any]]:
    """All loads in turns; the rows of the table, which is printed."""
    bundle = Bundle.open(options.bundle, threads=1, verify_digests=False)
    prompts = [encode(bundle, item.text) for item in load_sets(options.prompts or list(SHIPPED))]
    loads = [Load(bundle, mode, options.rows, options.max_new_tokens) for mode in options.modes.split(",")]
    found: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for turn in range(options.turns + 1):  # the first one warms up
        part = [prompts[(turn * options.requests + k) % len(prompts)] for k in range(options.requests)]
        for clients in map(int, options.concurrency.split(",")):
            texts = None
            for load in loads:
                result = load.run(part, clients)
                print(f"turn {turn}, {clients} clients, {load.mode}", file=sys.stderr, flush=True)
                mine = result.pop("texts")
                if texts is not None and mine != texts:
                    print(f"{clients} clients, {load.mode}: another text", file=sys.stderr)
                texts = mine
                if turn:
                    found.setdefault((clients, load.mode), []).append(result)
    names = list(next(iter(found.values()))[0])
    print("clients  mode  " + "  ".join(f"{name:>24}" for name in names))
    rows = []
    for (clients, mode), runs in found.items():
        values = {name: median(run[name] for run in runs) for name in names}
        rows.append({"clients": clients, "mode": mode} | values)
        print(f"{clients:7}  {mode:4}  " + "  ".join(f"{value:24.2f}" for value in values.values()))
    return rows


if __name__ == "__main__":
    main()
