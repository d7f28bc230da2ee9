"""Throughput and waiting times of a service at several loads, beside generate() and other servers, in turns.

    python -m benchmarks.serving BUNDLE --concurrency 1,2,4,8 --modes off,auto --threads 2
    python -m benchmarks.serving BUNDLE --server dspark=http://127.0.0.1:8000 --server llama=http://127.0.0.1:8080
    python -m benchmarks.serving BUNDLE --server dspark=http://127.0.0.1:8000#PID  # with the server's CPU time
    python -m benchmarks.serving BUNDLE --rate 2            # requests arrive at random, two a second

Every round of turns runs every front once at every concurrency; figures are the medians of the turns. Texts of the
fronts that give token ids are compared with plain decoding. The table goes to stdout, everything to --json.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import median

from benchmarks.serving.fronts import GenerateFront, OpenAIFront, ServiceFront
from benchmarks.serving.load import Front, Result, closed_loop, poisson
from dspark_export.prompts.sets import SHIPPED, load_sets
from dspark_export.prompts.texts import encode
from dspark_runtime import Bundle
from dspark_runtime.processors import this_machine

_RATES = ("tokens_per_second", "decode_tokens_per_second", "accepted_length", "cpu_ms_per_token")


def arguments() -> argparse.Namespace:
    """The parsed command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--concurrency", default="1,2,4,8")
    parser.add_argument("--rate", type=float, help="requests a second that arrive at random, instead of a closed loop")
    parser.add_argument("--modes", default="off,auto")
    parser.add_argument("--generate", action="store_true", help="generate() beside the service, one after another")
    parser.add_argument("--server", action="append", default=[], metavar="NAME=URL[#PID]", help="an OpenAI server")
    parser.add_argument("--model", default="", help="what the servers call the model")
    parser.add_argument("--requests", type=int, default=16, help="of each front, turn and concurrency")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--prompts", action="append", help=f"set ({', '.join(SHIPPED)}) or file; default: all sets")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def opened(options: argparse.Namespace, prompts: list[list[int]]) -> list[Front]:
    """Every front of the command line."""
    bundle = Bundle.open(options.bundle, threads=options.threads)
    modes = [mode for mode in options.modes.split(",") if mode]
    tokens = options.max_new_tokens
    fronts: list[Front] = [ServiceFront(bundle, prompts, tokens, options.rows, mode) for mode in modes]
    if options.generate:
        fronts += [GenerateFront(bundle, prompts, tokens, mode) for mode in modes]
    for server in options.server:
        name, _, place = server.partition("=")
        url, _, process = place.partition("#")
        fronts.append(OpenAIFront(name, url, options.model, prompts, tokens, int(process or 0)))
    return fronts


def main() -> None:
    """Run all loads and print the table."""
    options = arguments()
    items = load_sets(options.prompts or list(SHIPPED))
    bundle = Bundle.open(options.bundle, threads=options.threads, verify_digests=False)
    prompts = [encode(bundle, item.text) for item in items]
    plain: dict[int, tuple[int, ...]] = {}
    fronts = opened(options, prompts)
    levels = [0] if options.rate else [int(level) for level in options.concurrency.split(",")]
    found: dict[tuple[str, int], list[Result]] = {}
    for turn in range(options.turns + 1):  # the first one warms up: costs and acceptance are learned
        numbers = [(turn * options.requests + place) % len(prompts) for place in range(options.requests)]
        for level in levels:
            for front in fronts:
                print(f"turn {turn} of {options.turns}, {level} clients, {front.name}", file=sys.stderr, flush=True)
                run = (
                    poisson(front, numbers, options.rate, turn) if options.rate else closed_loop(front, numbers, level)
                )
                if turn:
                    found.setdefault((front.name, level), []).append(run)
                for number, text in run.texts.items():
                    if isinstance(text, tuple):
                        expected = plain.setdefault(number, text)
                        if text != expected:
                            print(f"prompt {number}: {front.name} gave another text", file=sys.stderr)
    report(found, options)
    for front in fronts:
        front.close()


def report(found: dict[tuple[str, int], list[Result]], options: argparse.Namespace) -> None:
    """The table, and the file."""
    machine = this_machine()
    print(f"{machine.cpu}, {options.threads or machine.physical_cores} threads, {options.bundle}\n")
    print(
        "front               clients   tok/s  decode tok/s  first p50  p95 ms   next p50   p95 ms  tokens/round  CPU ms"
    )
    rows = []
    for (name, level), runs in found.items():
        values = {
            key: median(run.row()[key] for run in runs)
            for key in (
                "tokens_per_second",
                "decode_tokens_per_second",
                "accepted_length",
                "cpu_ms_per_token",
                "failed",
            )
        }
        times = [
            1e3 * median(getattr(run, key)[k] for run in runs) for key in ("first_token", "between") for k in (0, 1)
        ]
        print(
            f"{name:20}{level:7}{values['tokens_per_second']:8.1f}{values['decode_tokens_per_second']:14.1f}"
            f"{times[0]:11.0f}{times[1]:8.0f}{times[2]:11.1f}{times[3]:9.1f}{values['accepted_length']:14.2f}"
            f"{values['cpu_ms_per_token']:8.2f}"
        )
        rows.append({"front": name, "clients": level} | values | {"runs": [run.row() for run in runs]})
    if options.json is not None:
        options.json.write_text(json.dumps({"machine": vars(machine), "rows": rows}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
