"""How much of a block drafter's acceptance is lost where its target is quantized?

    python benchmarks/acceptance_by_precision.py MODEL DRAFTER BUNDLE [BUNDLE ...] --prompts gsm8k.jsonl --prompts code

BUNDLEs are built from MODEL with ``--draft DRAFTER``, each in another precision. Each of them answers the prompts
greedily. Then each reads the answers of the first one (``same text``) and its own (``own text``), and the drafter
drafts through them from the features that the bundle computed: chains, and trees of 15 drafts. What is accepted is what
agrees with the text. On a bundle's own text that is what its runtime reaches; on the
same text only the features differ.

A table goes to stdout, tokens per round with the bonus token; progress to stderr.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from dspark_export.checkpoints import resolve
from dspark_export.prompts.answers import Response, answer
from dspark_export.prompts.sets import load_sets
from dspark_export.prompts.texts import encode
from dspark_export.train.bundle_features import BundleTarget
from dspark_export.train.evaluate import evaluate, tree_lengths
from dspark_export.train.features import Rows, Sample
from dspark_export.train.module import TrainableDrafter
from dspark_export.train.options import TREE
from dspark_export.train.saving import load_drafter
from dspark_export.train.targets import embedding_and_head
from dspark_runtime import Bundle


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("drafter", type=Path)
    parser.add_argument("bundles", type=Path, nargs="+")
    parser.add_argument("--prompts", action="append", required=True, help="a file or a shipped set; repeatable")
    parser.add_argument("--limit", type=int, default=20, help="prompts of each set")
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def sample(item: Response, rows: Rows) -> Sample:
    """A text with what the bundle computed of it."""
    ids = np.asarray([*item.prompt, *item.response], np.int32)
    features = rows.features.contiguous().view(torch.int16).numpy()
    return Sample(ids, len(item.prompt), features, rows.top_ids.numpy(), rows.top_probs.numpy())


def lengths(model: TrainableDrafter, target: BundleTarget, texts: Sequence[Response]) -> tuple[float, float]:
    """Accepted length of chains and of trees."""
    rows = (target([*item.prompt, *item.response], len(item.prompt), 1) for item in texts)
    samples = [sample(item, found) for item, found in zip(texts, rows, strict=True)]
    trees = tree_lengths(model, samples, torch.float32, (TREE,))
    return evaluate(model, samples, torch.float32).accepted_length, trees[TREE]


def main() -> int:
    """Returns the exit code."""
    arguments = parsed()
    torch.set_num_threads(arguments.threads)
    model = load_drafter(arguments.drafter, *embedding_and_head(resolve(arguments.model).load_model(torch.float32)))
    items = load_sets(arguments.prompts, arguments.limit)
    names = list(dict.fromkeys(item.set for item in items))
    first: dict[str, list[Response]] = {}
    print("| precision | set | same text, chain | tree | own text, chain | tree |\n|---|---|---|---|---|---|")
    for path in arguments.bundles:
        bundle = Bundle.open(path, threads=arguments.threads)
        target, precision = BundleTarget(bundle, model.geometry.taps), bundle.manifest.precision.weights
        for name in names:
            prompts = [encode(bundle, item.text) for item in items if item.set == name]
            own = list(answer(bundle, prompts, max_new_tokens=arguments.max_new_tokens))
            print(f"{precision}: answered {len(own)} of {name}", file=sys.stderr)
            same = first.setdefault(name, own)
            found = [*lengths(model, target, same), *lengths(model, target, own)]
            print(f"| {precision} | {name} | {' | '.join(f'{value:.2f}' for value in found)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
