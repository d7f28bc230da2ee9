"""The model card of a trained drafter: what it is for, what it was made from, and what it reached."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dspark_export.bench.machine import this_machine
from dspark_export.train.module import DraftGeometry
from dspark_export.train.options import TrainOptions
from dspark_export.train.responses import Response

if TYPE_CHECKING:
    from dspark_export.checkpoints import Checkpoint
    from dspark_export.train.pipeline import TrainedDrafter


def write_card(
    path: Path,
    checkpoint: Checkpoint,
    geometry: DraftGeometry,
    options: TrainOptions,
    trained: TrainedDrafter,
    responses: tuple[Sequence[Response], Sequence[Response]],
    license_: str | None,
) -> None:
    """Write a README.md in the form model hubs read."""
    g, (learn, judge) = geometry, responses
    tokens = sum(len(item.response) for item in learn)
    temperatures = sorted({item.temperature for item in learn})
    machine = this_machine()
    draftable = options.shape.draft_vocab or g.vocab
    head = f"{g.markov}, rank {g.rank}" if g.markov != "none" else "none"
    hours = trained.seconds["training"] / 3600
    lines = [
        "---",
        *([f"license: {license_}"] if license_ else []),
        f"base_model: {checkpoint.id}",
        "library_name: dspark-export",
        "tags: [speculative-decoding, dspark]",
        "---",
        "",
        f"# DSpark drafter for {checkpoint.id}",
        "",
        f"Drafts {g.block} tokens per pass for {checkpoint.id} ({checkpoint.config.model_type}); it is of no use with",
        "any other model. The text stays the target's own: what it drafts is verified.",
        "",
        "```",
        f"dspark-export build {checkpoint.id} --draft {trained.out.name} --out bundle",
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
        f"| license | {license_ or 'not stated; it was learnt from what the target says, see its licence'} |",
        "",
        "## Training",
        "",
        f"{len(learn)} responses of the target itself, {tokens} tokens, at temperatures "
        f"{', '.join(f'{t:g}' for t in temperatures)}.",
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
        f"**{trained.accepted_length:.2f}** ({trained.untrained_length:.2f} untrained).",
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
            f"{100 * after:.1f} % after one temperature per slot (fitted to half of the rounds, measured on the "
            "others).",
            "",
        ]
    path.write_text("\n".join(lines), "utf-8")
