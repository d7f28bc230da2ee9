"""The model card of a trained drafter: what it is for, what it was made from, and what it reached."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dspark_export.prompts.answers import Response
from dspark_export.train.module import DraftGeometry
from dspark_export.train.options import TREE, TrainOptions
from dspark_runtime.processors import this_machine

if TYPE_CHECKING:
    from dspark_export.checkpoints import Checkpoint


@dataclass(frozen=True)
class CardFacts:
    """What only the user knows: ``license`` of the drafter, ``base_model`` as a hub calls the target, and a ``note`` on
    what it was trained with."""

    license: str | None = None
    base_model: str | None = None
    note: str | None = None


@dataclass(frozen=True)
class TrainedDrafter:
    """A finished training. ``accepted_length``: tokens per round of a chain, bonus included, greedy, on held-out
    responses; ``tree_length``: of trees of ``options.TREE`` drafts."""

    out: Path
    accepted_length: float
    untrained_length: float
    tree_length: float
    survival: tuple[float, ...]
    calibration_error: tuple[float, float]
    parameters: int
    steps: int
    seconds: dict[str, float]


def write_card(
    path: Path,
    checkpoint: Checkpoint,
    geometry: DraftGeometry,
    options: TrainOptions,
    trained: TrainedDrafter,
    responses: tuple[Sequence[Response], Sequence[Response]],
    facts: CardFacts,
) -> None:
    """Write a README.md in the form model hubs read."""
    g, (learn, judge) = geometry, responses
    local = checkpoint.source().kind != "hub"
    name = facts.base_model or (Path(checkpoint.id).name if local else checkpoint.id)
    tokens = sum(len(item.response) for item in learn)
    temperatures = sorted({item.temperature for item in learn})
    machine = this_machine()
    draftable = options.shape.draft_vocab or g.vocab
    head = f"{g.markov}, rank {g.rank}" if g.markov != "none" else "none"
    hours = trained.seconds["training"] / 3600
    lines = [
        "---",
        *([f"license: {facts.license}"] if facts.license else []),
        f"base_model: {name}",
        "library_name: dspark-export",
        "tags: [speculative-decoding, dspark]",
        "---",
        "",
        f"# DSpark drafter for {name}",
        "",
        f"Drafts {g.block} tokens per pass for {name} ({checkpoint.config.model_type}); it is of no use with",
        "any other model. The text stays the target's own: what it drafts is verified.",
        "",
        "```",
        f"dspark-export build {name} --draft {trained.out.name} --out bundle",
        "```",
        "",
        "| | |",
        "|---|---|",
        f"| parameters | {trained.parameters / 1e6:.2f} M, bfloat16, beside the target's embedding and head |",
        f"| layers | {g.layers}, hidden {g.hidden}, feed-forward {g.intermediate} |",
        f"| reads target layers | {', '.join(map(str, g.taps))} |",
        f"| Markov head | {head} |",
        f"| confidence head | {'yes' if g.confidence else 'no'} |",
        f"| draft vocabulary | {draftable} of {g.vocab} tokens |",
        f"| license | {facts.license or 'not stated; it was learnt from what the target says, see its licence'} |",
        "",
        "## Training",
        "",
        f"{len(learn)} responses of the target itself, {tokens} tokens, at temperatures "
        f"{', '.join(f'{t:g}' for t in temperatures)}.",
        *([facts.note] if facts.note else []),
        f"{trained.steps} steps of {options.batch * options.accumulate} sequences with up to {options.anchors} blocks "
        f"each, {options.dtype}, peak rate {options.peak_rate:g}, {hours:.1f} hours on {machine.cpu}, "
        f"{machine.logical_cores} logical cores.",
        f"Loss: {options.ce:g} cross-entropy, {options.tv:g} distance of distributions, {options.confidence:g} "
        f"confidence; average of the weights with {options.ema:g}.",
        "",
        "![Curves](curves.png)",
        "",
        "## Measured",
        "",
        f"On {len(judge)} held-out greedy responses, tokens per round with the bonus: "
        f"**{trained.accepted_length:.2f}** ({trained.untrained_length:.2f} before this training), and of trees of "
        f"{TREE} drafts **{trained.tree_length:.2f}**. By slot of the chain:",
        "",
        "| slot | " + " | ".join(str(slot) for slot in range(g.block)) + " |",
        "|---|" + "---|" * g.block,
        "| survives | " + " | ".join(f"{100 * share:.0f} %" for share in trained.survival) + " |",
        "",
    ]
    if g.confidence:
        before, after = trained.calibration_error
        lines += [
            f"Expected calibration error of cumulative confidences: {100 * before:.1f} % as trained, "
            f"{100 * after:.1f} % after a shift of the head and one temperature per slot (fitted to half of the "
            "rounds, measured on the others).",
            "",
        ]
    path.write_text("\n".join(lines), "utf-8")


def record(
    options: TrainOptions,
    trained: TrainedDrafter,
    log: Sequence[Mapping[str, Any]],
    responses: tuple[Sequence[Response], Sequence[Response]],
) -> str:
    """What a script would want to know of a training, as JSON."""
    evaluations = [line for line in log if "accepted_length" in line]
    counted = {
        name: {"count": len(items), "tokens": sum(len(item.response) for item in items)}
        for name, items in zip(("learn", "judge"), responses, strict=True)
    }
    facts = {
        "accepted_length": trained.accepted_length,
        "untrained_length": trained.untrained_length,
        "tree_length": trained.tree_length,
        "survival": list(trained.survival),
        "calibration_error": list(trained.calibration_error),
        "parameters": trained.parameters,
        "steps": trained.steps,
        "seconds": {name: round(value, 1) for name, value in trained.seconds.items()},
        "options": options.fingerprint(),
        "responses": counted,
        "evaluations": evaluations,
    }
    return json.dumps(facts, indent=2) + "\n"
