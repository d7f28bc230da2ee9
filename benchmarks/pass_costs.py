"""Time of each bundle's target pass by number of rows; bundles alternate, so that they can be compared.

    python benchmarks/pass_costs.py BUNDLE... [--rows 1,2,4,8,16,32] [--context 256] [--threads 2] [--both]

Prints the median over the repeats in milliseconds. A build measures its own bundle alone; two builds on a shared
machine differ by a tenth or more.
"""

from __future__ import annotations

import argparse
import json
import os
import sys

import numpy as np
from rich.console import Console
from rich.table import Table

from dspark_runtime import Bundle
from dspark_runtime.backends.ort_kernels import LIBRARY_VARIABLE, NO_LIBRARY
from dspark_runtime.backends.protocol import Engine
from dspark_runtime.errors import DsparkError
from dspark_runtime.speculation.costs import pass_timer, warmed_up

_WIDTH = 1000  # of the console: a table is as wide as its rows, and paths of bundles stay in one piece


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+")
    parser.add_argument("--rows", default="1,2,4,8,16,32", help="numbers of rows, with commas between")
    parser.add_argument("--context", type=int, default=256, help="tokens in the cache")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--both", action="store_true", help="each bundle without the sequence kernels, too")
    parser.add_argument("--json", action="store_true", help="print {bundle: {rows: ms}} instead of a table")
    given = parser.parse_args()
    try:
        rows = [int(part) for part in given.rows.split(",")]
        if min(rows) < 1:
            raise ValueError(f"--rows {given.rows}: a pass has one row or more")
        engines = {path: _target(path, given.threads) for path in dict.fromkeys(given.bundles)}
        if given.both:
            engines |= {f"{path} without kernels": _without_kernels(path, given.threads) for path in list(engines)}
    except (DsparkError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    timers = {name: pass_timer(engine, max(rows), given.context) for name, engine in engines.items()}
    seen: dict[str, dict[int, list[float]]] = {path: {count: [] for count in rows} for path in timers}
    for _ in range(given.repeats):
        for count in rows:
            for path, timed in timers.items():
                seen[path][count].append(warmed_up(timed, count))
    found = {path: {n: float(np.median(ms)) for n, ms in times.items()} for path, times in seen.items()}
    if given.json:
        print(json.dumps(found, indent=2))
        return 0
    table = Table("rows", box=None, pad_edge=False)
    for count in rows:
        table.add_column(str(count), justify="right")
    for path, times in found.items():
        table.add_row(path, *(f"{times[count]:.1f}" for count in rows))
    Console(width=_WIDTH).print(table)
    return 0


def _target(path: str, threads: int) -> Engine:
    return Bundle.open(path, threads=threads).engine("target", False)


def _without_kernels(path: str, threads: int) -> Engine:
    before = os.environ.get(LIBRARY_VARIABLE)
    os.environ[LIBRARY_VARIABLE] = NO_LIBRARY
    try:
        return _target(path, threads)
    finally:
        os.environ.pop(LIBRARY_VARIABLE)
        if before is not None:
            os.environ[LIBRARY_VARIABLE] = before


if __name__ == "__main__":
    sys.exit(main())
