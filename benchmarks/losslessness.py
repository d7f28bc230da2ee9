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
from dataclasses import asdict, dataclass

import numpy as np

from dspark_export.bench.prompts import PromptItem, load_sets
from dspark_export.bench.runner import PLAIN, checked_modes, encode, first_difference, modes_of
from dspark_export.measure import NOISE_ROWS, row_logits
from dspark_runtime import Bundle
from dspark_runtime.errors import DsparkError, UsageError

NEAR_TIE, WRONG = "near tie", "WRONG"


@dataclass(frozen=True)
class Divergence:
    """A first difference from the plain text. ``margin`` is between the target's two best logits there, ``behind`` how
    far the worse of the two chosen tokens is behind the best one; ``local_noise`` is the row noise at this place.
    ``token`` is None where one of the texts had ended."""

    mode: str
    batch: int
    set: str
    prompt: int
    position: int
    plain_token: int | None
    token: int | None
    margin: float | None
    behind: float | None
    local_noise: float | None
    verdict: str


def generate(bundle: Bundle, ids: Sequence[list[int]], mode: str, batch: int, max_new_tokens: int) -> list[list[int]]:
    """Greedy tokens of every prompt, ``batch`` of them at a time."""
    runs = bundle.with_fresh_schedule()
    texts: list[list[int]] = []
    for start in range(0, len(ids), batch):
        part = ids[start : start + batch]
        found = runs.generate(part, max_new_tokens=max_new_tokens, speculate=mode, batch_size=batch)
        texts += [generation.tokens for generation in found]
        print(f"\r{mode}, batch {batch}: {len(texts)} of {len(ids)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return texts


def next_logits(bundle: Bundle, tokens: Sequence[int]) -> np.ndarray:
    """The target's logits [passes, vocab] after ``tokens``: first from one pass, then with passes of other rows."""
    context = len(tokens) - 1
    widths = [1, *(rows for rows in NOISE_ROWS if rows < context)]
    # row_logits gives no logits for its first pass, so the last token, or the last rows, come in a second one.
    return np.stack([row_logits(bundle.target, tokens, len(tokens) - rows, rows)[-1] for rows in widths])


def judge(
    bundle: Bundle, prompt: list[int], plain: list[int], position: int, chosen: Sequence[int | None], promised: bool
) -> dict:
    """Margin, noise and verdict at the first divergence of one text; ``promised``: there should be none."""
    if None in chosen:  # nothing but a token can end a greedy text: one of them ended without a reason
        return {"margin": None, "behind": None, "local_noise": None, "verdict": WRONG}
    logits = next_logits(bundle, [*prompt, *plain[:position]])
    reference = logits[0]
    best, second = np.sort(reference)[::-1][:2]
    local = float(np.abs(logits - reference).max())
    recorded = bundle.manifest.precision.row_noise
    noise = local if recorded is None else recorded.max_abs_logit_diff
    behind = float(best - min(reference[token] for token in chosen if token is not None))
    margin = float(best - second)
    allowed = not promised and max(margin, behind) <= noise
    return {"margin": margin, "behind": behind, "local_noise": local, "verdict": NEAR_TIE if allowed else WRONG}


def compare(
    bundle: Bundle, items: Sequence[PromptItem], modes: Sequence[str], batches: Sequence[int], max_new_tokens: int
) -> tuple[list[dict], list[Divergence]]:
    """Run everything; one row per mode and batch size, and all first divergences."""
    ids = [encode(bundle, item.text) for item in items]
    plain = {batch: generate(bundle, ids, PLAIN, batch, max_new_tokens) for batch in sorted({1, *batches})}
    rows, divergences = [], []
    for mode in modes:
        for batch in batches:
            if (mode, batch) == (PLAIN, 1):
                continue
            reference = 1 if mode == PLAIN else batch
            texts = plain[batch] if mode == PLAIN else generate(bundle, ids, mode, batch, max_new_tokens)
            found = []
            for index, (expected, tokens) in enumerate(zip(plain[reference], texts, strict=True)):
                position = first_difference(expected, tokens)
                if position is not None:
                    chosen = [t[position] if position < len(t) else None for t in (expected, tokens)]
                    verdict = judge(bundle, ids[index], expected, position, chosen, bundle.exact and mode != PLAIN)
                    found.append(Divergence(mode, batch, items[index].set, index, position, *chosen, **verdict))
            wrong = sum(d.verdict == WRONG for d in found)
            figures = {"equal": len(ids) - len(found), "near_ties": len(found) - wrong, "wrong": wrong}
            rows.append({"mode": mode, "batch": batch, "compared_with_plain_batch": reference} | figures)
            divergences += found
    return rows, divergences


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
        rows, divergences = compare(bundle, items, modes, batches, options.max_new_tokens)
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
