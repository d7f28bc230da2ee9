"""What choosing a self-draft's layers while running could gain over choosing them once, at build time.

    python benchmarks/layer_choice.py MODEL [--kept 12,15,18,21,24]

Agreement is the share of positions where the layers that are kept have the target's most probable token; a draft reads
the target's own keys and values before it, as the runtime's self-draft does. For each number of kept layers:

* ``once``: evenly spaced, the first ones, and the best set that the build knows for any text;
* ``text``: as in SWIFT (Xia et al. 2024), sets are searched at random on the first half of each text, and the best one
  drafts its second half;
* ``token``: as in CLaSp (Chen et al. 2025), after every token the layers whose loss changes its hidden state least, by
  dynamic programming, draft the next one.

What the search costs is left out.

``gain`` is the speed over plain decoding that the agreement predicts, with a draft that costs its share of the weights.
"""

from __future__ import annotations

import argparse
import random
import sys

import torch
from rich.console import Console
from rich.table import Table

from dspark_export.checkpoints.resolve import resolve
from dspark_export.graphs.draft_probe import DraftProbe
from dspark_export.graphs.self_draft_choice import LayerCosts, predict


def evenly(count: int, kept: int) -> tuple[int, ...]:
    """``kept`` of ``count`` layers, the first and the last among them."""
    return tuple(sorted({round(i * (count - 1) / max(kept - 1, 1)) for i in range(kept)}))


def least_important(probe: DraftProbe, kept: int, alone: dict[int, float]) -> tuple[int, ...]:
    """The layers whose absence alone costs most agreement."""
    ranked = sorted(alone, key=lambda n: (alone[n], n))
    always = {0, probe.layers - 1}
    return tuple(sorted([*always, *[n for n in ranked if n not in always][: max(0, kept - 2)]]))


def searched(probe: DraftProbe, kept: int, begin: tuple[int, ...], tries: int, seed: int) -> float:
    """Agreement on the second half of each text, of the set that agrees most often on its first half."""
    rng, texts, half = random.Random(seed), len(probe.wanted), probe.wanted.shape[1] // 2
    found = probe.agrees(begin).float()
    best, best_set = found[:, :half].mean(1), [set(begin)] * texts
    result = found[:, half:].mean(1)
    for number in range(tries):
        layers = set(best_set[number % texts])  # change what is best for one text, and try it on all
        for _ in range(rng.choice((1, 1, 2, 3))):
            layers.remove(rng.choice(sorted(layers)))
            layers.add(rng.choice(sorted(set(range(probe.layers)) - layers)))
        found = probe.agrees(sorted(layers)).float()
        score = found[:, :half].mean(1)
        for text in torch.nonzero(score > best).flatten().tolist():
            best[text], best_set[text], result[text] = score[text], layers, found[text, half:].mean()
    return float(result.mean())


def by_token(probe: DraftProbe, kept: int) -> float:
    """Agreement at each position of the layers that were best for the hidden state of the position before it."""
    skips = probe.layers - kept
    texts, positions, _ = probe.hidden[0].shape
    states: list[torch.Tensor | None] = [probe.hidden[0], *[None] * skips]  # by layers skipped so far
    masks = [torch.zeros(probe.layers, texts, positions, dtype=torch.bool) for _ in range(skips + 1)]
    for number in range(probe.layers):
        truth = probe.hidden[number + 1]
        after: list[torch.Tensor | None] = []
        kept_masks = []
        for skipped in range(skips + 1):
            here, left = states[skipped], states[skipped - 1] if skipped else None
            run = None if here is None else probe.layer(number, here)
            if run is None or left is None:
                after.append(run if run is not None else left)
                mask = (masks[skipped] if run is not None else masks[skipped - 1]).clone()
                mask[number] = run is not None
            else:
                keep = torch.cosine_similarity(run, truth, -1) >= torch.cosine_similarity(left, truth, -1)
                after.append(torch.where(keep[..., None], run, left))
                mask = torch.where(keep, masks[skipped], masks[skipped - 1])
                mask[number] = keep
            kept_masks.append(mask)
        states, masks = after, kept_masks
    keep = masks[skips].roll(1, dims=2)  # the set of a position drafts the next one
    hidden = probe.hidden[0]
    for number in range(probe.layers):
        hidden = torch.where(keep[number][..., None], probe.layer(number, hidden), hidden)
    return float((probe.tokens(hidden) == probe.wanted)[:, 1:].float().mean())


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="hub id, folder or GGUF file")
    parser.add_argument("--kept", default="12,15,18,21,24", help="numbers of layers")
    parser.add_argument("--tokens", type=int, default=48, help="of each text")
    parser.add_argument("--tries", type=int, default=60, help="sets of the random search, for each number of layers")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    checkpoint = resolve(given.model)
    model, tokenizer = checkpoint.load_model(torch.float32), checkpoint.tokenizer
    if tokenizer is None:
        print("the model has no tokenizer: there are no texts to measure on", file=sys.stderr)
        return 2
    probe = DraftProbe(model, tokenizer.backend, prompts=6, tokens=given.tokens)
    costs, count = LayerCosts.of(model), probe.layers
    alone = {n: probe.agreement([m for m in range(count) if m != n]) for n in range(1, count - 1)}
    table = Table("layers", "cost", "", "agreement", "gain")
    for kept in map(int, given.kept.split(",")):
        print(f"{kept} of {count} layers", file=sys.stderr, flush=True)
        even, first, least = evenly(count, kept), tuple(range(kept)), least_important(probe, kept, alone)
        sets = {"once, evenly": even, "once, first": first, "once, least important out": least}
        found = {name: probe.agreement(layers) for name, layers in sets.items()}
        begin = max(sets.values(), key=probe.agreement)
        found["text (SWIFT)"] = searched(probe, kept, begin, given.tries, given.seed)
        found["token (CLaSp)"] = by_token(probe, kept)
        for name, agreement in found.items():
            choice = predict(even, agreement, costs.relative(even))
            table.add_row(str(kept), f"{choice.relative_cost:.2f}", name, f"{agreement:.2f}", f"{choice.speedup:.2f}")
    Console(width=100).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
