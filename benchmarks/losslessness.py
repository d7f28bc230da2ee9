"""Does speculation keep the text? Greedy speculative tokens against plain greedy ones, on prompts of a file.

    python benchmarks/losslessness.py BUNDLE PROMPTS.jsonl [...] --modes ngram,self-draft --batch 1,4 --limit 80

Every mode runs with each batch size and is compared with plain decoding at the same batch size; plain decoding in
batches is compared with that of single prompts. In the exact setting all speculative tokens must be equal. Otherwise,
and between texts alone and in batches, which run other variants of the graph, logits move a little with the number of
rows of a pass, and a text may leave the plain one where the target's best tokens are closer than that. At every first
divergence the target is asked again, by teacher forcing: its logits after the plain tokens up to there. It is a
``near tie`` if both tokens, and the two best ones, are within the bundle's row noise of the best, and ``WRONG``
otherwise. Row noise is the figure of the manifest; where that has none, the largest change of a logit at the divergence
itself between passes of 1, 2, 3, 5, 8 and 16 rows.

The summary goes to stdout as JSON, progress to stderr. Exit code 1 if anything is WRONG.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from dspark_export.bench.runner import checked_modes, modes_of
from dspark_export.prompts.sets import PromptItem, load_sets
from dspark_export.validate.lossless import WRONG, compare
from dspark_runtime import Bundle
from dspark_runtime.errors import DsparkError, UsageError


def show(mode: str, batch: int, done: int) -> None:
    print(f"\r{mode}, batch {batch}: {done} texts   ", end="", file=sys.stderr, flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare greedy speculative tokens with plain greedy ones.")
    parser.add_argument("bundle")
    parser.add_argument("prompts", nargs="+", help="JSON lines with `turns` or `prompt`, or a shipped set")
    parser.add_argument("--modes", help="comma-separated (default: all that the bundle has)")
    parser.add_argument("--batch", default="1,4", help="batch sizes, comma-separated")
    parser.add_argument("--limit", type=int, default=80, help="prompts in all, taken in turn from the files")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--exact", action=argparse.BooleanOptionalAction, help="default: the bundle's own setting")
    return parser.parse_args()


def in_turn(items: Sequence[PromptItem], limit: int) -> list[PromptItem]:
    """The first prompt of every set, then the second of every set, and so on."""
    place: dict[str, int] = {}
    keyed = []
    for item in items:
        keyed.append((place.setdefault(item.set, 0), item))
        place[item.set] += 1
    return [item for _, item in sorted(keyed, key=lambda pair: pair[0])][:limit]


def main() -> int:
    options = arguments()
    try:
        batches = [int(size) for size in options.batch.split(",")]
        bundle = Bundle.open(options.bundle, threads=options.threads, exact=options.exact)
        modes = checked_modes(options.modes.split(","), bundle) if options.modes else modes_of(bundle)
        items = in_turn(load_sets(options.prompts), options.limit)
        rows, divergences = compare(bundle, items, modes, batches, options.max_new_tokens, show)
        print(file=sys.stderr)
    except ValueError as error:
        print(f"--batch {options.batch}: give whole numbers, comma-separated ({error})", file=sys.stderr)
        return UsageError.exit_code
    except DsparkError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    noise = bundle.manifest.precision.row_noise
    wrong = sum(d.verdict == WRONG for d in divergences)
    summary = {
        "bundle": str(options.bundle),
        "precision": bundle.manifest.precision.weights,
        "exact": bundle.exact,
        "row_noise": None if noise is None else noise.max_abs_logit_diff,
        "prompts": len(items),
        "max_new_tokens": options.max_new_tokens,
        "results": rows,
        "divergences": [asdict(d) for d in divergences],
        "wrong": wrong,
    }
    print(json.dumps(summary, indent=2))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
