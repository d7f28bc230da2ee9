"""What HTTP costs: CPU time of a server for each chunk of a stream, beside the service alone.

    python -m benchmarks.serving.http_cost BUNDLE --concurrency 1,8,16

Service and server run in this process with one thread of operators, so that everything outside the engine's thread is
the front end: event loop, parsing, templates, JSON. The clients of the server run in another process. ``engine`` and
``front`` are CPU microseconds a chunk, the prompts' share included; ``share`` is the front end's part of both. The last
column compares the requests a second of streams with those of whole answers.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.pool import Pool
from pathlib import Path
from statistics import median

import uvicorn

from benchmarks.serving.fronts import OpenAIFront, ServiceFront
from benchmarks.serving.load import Front, closed_loop
from dspark_export.prompts.sets import SHIPPED, load_sets
from dspark_export.prompts.texts import encode
from dspark_runtime import Bundle, Service, ServiceOptions
from dspark_runtime.processors import this_machine
from dspark_serve.app import make_app
from dspark_serve.heads import http_protocol
from dspark_serve.serving import Served

MODEL = "served"


@dataclass(frozen=True)
class Cost:
    """One load: seconds, chunks that came, and CPU seconds of the engine's thread and of all others."""

    seconds: float
    chunks: int
    engine: float
    front: float


def measured(service: Service, load: Callable[[], tuple[float, int]]) -> Cost:
    """What ``load`` takes, which gives its seconds and chunks."""
    assert service._thread is not None and service._thread.ident is not None
    engine = time.pthread_getcpuclockid(service._thread.ident)
    before = time.clock_gettime(engine), time.process_time()
    seconds, chunks = load()
    own, all_ = time.clock_gettime(engine) - before[0], time.process_time() - before[1]
    return Cost(seconds, chunks, own, all_ - own)


def loaded(front: Front, numbers: Sequence[int], clients: int) -> tuple[float, int]:
    """Seconds and chunks of a closed loop of ``clients``."""
    result = closed_loop(front, numbers, clients)
    return result.seconds, result.chunks


def loaded_over_http(
    url: str, prompts: Sequence[Sequence[int]], tokens: int, numbers: Sequence[int], clients: int, stream: bool
) -> tuple[float, int]:
    """The same, of a server; called in the process of the clients."""
    return loaded(OpenAIFront("server", url, MODEL, prompts, tokens, stream=stream), numbers, clients)


@contextmanager
def server(bundle: Bundle, options: ServiceOptions) -> Iterator[tuple[Service, str]]:
    """A server in a thread of this process: its service and its address."""
    served = Served.start(bundle, options, MODEL)
    with served.service, socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(make_app(served), http=http_protocol(), log_level="error", timeout_graceful_shutdown=5)
        running = uvicorn.Server(config)
        thread = threading.Thread(target=running.run, args=([listener],))
        thread.start()
        while not running.started:
            time.sleep(0.01)
        try:
            yield served.service, f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            running.should_exit = True
            thread.join()


def main() -> None:
    """Run all loads in turns and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--concurrency", default="1,8,16")
    parser.add_argument("--speculate", default="off")
    parser.add_argument("--requests", type=int, default=48, help="of each load")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--sets", action="append", help=f"of prompts: {', '.join(SHIPPED)}, or a file (default: all)")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    bundle = Bundle.open(options.bundle, threads=1, verify_digests=False)
    prompts = [encode(bundle, item.text) for item in load_sets(options.sets or list(SHIPPED))]
    tokens, rows = options.max_new_tokens, options.rows
    settings = ServiceOptions(rows, capacity=2048, queue=1024, speculate=options.speculate, reuse_prefixes=False)
    alone = ServiceFront(bundle, prompts, tokens, rows, options.speculate)
    costs: dict[tuple[int, str], list[Cost]] = {}
    clients_process: Pool = multiprocessing.get_context("spawn").Pool(1)
    with clients_process as elsewhere, server(bundle, settings) as (service, url):
        for turn in range(options.turns + 1):  # the first one warms up
            numbers = [(turn * options.requests + place) % len(prompts) for place in range(options.requests)]
            for clients in map(int, options.concurrency.split(",")):
                print(f"turn {turn} of {options.turns}, {clients} clients", file=sys.stderr, flush=True)
                found = {"service": measured(alone.service, lambda: loaded(alone, numbers, clients))}  # noqa: B023
                for name, stream in (("streamed", True), ("whole", False)):
                    asked = (url, prompts, tokens, numbers, clients, stream)
                    found[name] = measured(service, lambda: elsewhere.apply(loaded_over_http, asked))  # noqa: B023
                for name, cost in found.items():
                    if turn:
                        costs.setdefault((clients, name), []).append(cost)
    alone.close()
    report(costs, options)


def report(costs: dict[tuple[int, str], list[Cost]], options: argparse.Namespace) -> None:
    """The table, and the file."""
    machine = this_machine()
    print(f"{machine.cpu}, {options.bundle}, {options.speculate}\n")
    print("clients  front      requests/s  chunks/s  engine us  front us   share  streamed/whole")
    rows = []
    for (clients, name), found in costs.items():
        # A whole answer is made of as many chunks as a stream of it.
        chunks = [cost.chunks for cost in costs[clients, "streamed"]]
        rates = {
            kind: median(options.requests / cost.seconds for cost in costs[clients, kind])
            for kind in ("streamed", "whole")
        }
        engine = median(1e6 * cost.engine / count for cost, count in zip(found, chunks, strict=True))
        front = median(1e6 * cost.front / count for cost, count in zip(found, chunks, strict=True))
        row = {
            "clients": clients,
            "front": name,
            "requests_per_second": median(options.requests / cost.seconds for cost in found),
            "chunks_per_second": median(count / cost.seconds for cost, count in zip(found, chunks, strict=True)),
            "engine_us": engine,
            "front_us": front,
            "share": front / (engine + front),
            "streamed_over_whole": rates["streamed"] / rates["whole"],
        }
        rows.append(row)
        ratio = f"{row['streamed_over_whole']:16.2f}" if name == "streamed" else ""
        print(
            f"{clients:7}  {name:9}{row['requests_per_second']:12.1f}{row['chunks_per_second']:10.0f}{engine:11.0f}"
            f"{front:10.0f}{100 * row['share']:7.1f}%{ratio}"
        )
    if options.json is not None:
        options.json.write_text(json.dumps({"machine": vars(machine), "rows": rows}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
