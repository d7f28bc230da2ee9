"""What quantization does to a model: how far the distributions of bundles are from those of its fp32 bundle.

    python benchmarks/quantization_cost.py FP32_BUNDLE BUNDLE... [--prompts SET_OR_FILE]... [--limit 4]

Every prompt is continued by the fp32 bundle; all bundles then read the same texts. Reported for the positions of
prompts and of responses: divergence (KL, nats) and the share of positions with the same most likely token. w8a8 is
calibrated on the shipped sets: use other prompts for figures to report.
"""

from __future__ import annotations

import argparse
import json
import sys

import numpy as np
from rich.console import Console
from rich.table import Table

from dspark_export.build.row_noise import distances, row_logits
from dspark_export.prompts.sets import SHIPPED, load_sets
from dspark_export.prompts.texts import encode
from dspark_runtime import Bundle
from dspark_runtime.errors import DsparkError

_PREFIX = 2  # the first pass of row_logits; its positions are not compared
_WIDTH = 1000  # of the console: a table is as wide as its rows, and paths of bundles stay in one piece


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fp32", help="the bundle to compare with")
    parser.add_argument("bundles", nargs="+", help="quantized bundles of the same model")
    parser.add_argument("--prompts", action="append", help=f"set ({', '.join(SHIPPED)}) or file; default: all sets")
    parser.add_argument("--limit", type=int, default=4, help="prompts of each set")
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print a list of rows instead of a table")
    given = parser.parse_args()
    try:
        plain = Bundle.open(given.fp32, threads=given.threads)
        others = {path: Bundle.open(path, threads=given.threads) for path in given.bundles}
        prompts = [encode(plain, item.text) for item in load_sets(given.prompts or list(SHIPPED), given.limit)]
    except DsparkError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    parts: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {path: [] for path in others}
    for prompt in prompts:
        options = {"max_new_tokens": given.max_new_tokens, "speculate": "off", "ignore_eos": True}
        ids = [*prompt, *plain.generate(prompt, **options).tokens]
        wanted = row_logits(plain.engine("target", False), ids, _PREFIX, 48)
        for path, bundle in others.items():
            found = distances(wanted, row_logits(bundle.engine("target", False), ids, _PREFIX, 48))
            first = len(prompt) - 1 - _PREFIX  # of the positions that response tokens are drawn from
            parts[path].append((found[:first], found[first:-1]))
    rows = []
    for path, pairs in parts.items():
        for name, side in zip(("prompts", "responses"), zip(*pairs, strict=True), strict=True):
            joined = np.concatenate(side)
            divergence, same = (float(x) for x in joined.mean(0))
            rows.append({"bundle": path, "of": name, "positions": len(joined), "kl": divergence, "same_token": same})
    if given.json:
        print(json.dumps(rows, indent=2))
        return 0
    table = Table("bundle", "positions of", box=None, pad_edge=False)
    for column in ("positions", "KL", "same token"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            str(row["bundle"]), str(row["of"]), str(row["positions"]), f"{row['kl']:.4f}", f"{row['same_token']:.1%}"
        )
    Console(width=_WIDTH).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
