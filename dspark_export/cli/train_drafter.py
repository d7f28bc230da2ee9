"""``dspark-export train-drafter``: a DSpark drafter for a target that nobody has made one for."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from dspark_export.cli.build import ProgressName, terminable
from dspark_runtime.errors import UsageError

if TYPE_CHECKING:
    from dspark_export.train.pipeline import OnProgress, TrainedDrafter

_Number = TypeVar("_Number")

_DESCRIPTIONS = {
    "prompts": "letting the model ask",
    "responses": "letting the model answer",
    "features": "computing features",
    "training": "training",
}


class MarkovName(StrEnum):
    """Values of ``--markov``."""

    NONE = "none"
    VANILLA = "vanilla"
    GATED = "gated"
    RNN = "rnn"


class OptimizerName(StrEnum):
    """Values of ``--optimizer``."""

    MUON = "muon"
    ADAMW = "adamw"


class DtypeName(StrEnum):
    """Values of ``--dtype``."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


def train_drafter(
    model: Annotated[str, typer.Argument(help="Hub id, folder with config.json, or .gguf file.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the new drafter.", show_default=False)],
    work: Annotated[
        Path | None, typer.Option(help="Folder of what is kept between runs (default: OUT with `.work` behind).")
    ] = None,
    prompts: Annotated[
        list[Path] | None, typer.Option(help="Prompts to answer: lines, or JSON lines. Repeatable.")
    ] = None,
    synthesise: Annotated[int, typer.Option(help="Prompts the model writes itself.")] = 0,
    responses: Annotated[
        list[Path] | None, typer.Option(help="Token ids of prompts and responses, instead of answering. Repeatable.")
    ] = None,
    count: Annotated[int, typer.Option(help="Responses to make.")] = 2000,
    max_new_tokens: Annotated[int, typer.Option(help="Longest response, in tokens.")] = 256,
    temperatures: Annotated[str, typer.Option(help="Temperatures that prompts are answered at, in turns.")] = "0,0.7",
    steps: Annotated[int, typer.Option(help="Training steps.")] = 2000,
    batch: Annotated[int, typer.Option(help="Responses in a pass.")] = 16,
    accumulate: Annotated[int, typer.Option(help="Passes of a step.")] = 1,
    anchors: Annotated[int, typer.Option(help="Blocks in a response.")] = 32,
    max_length: Annotated[int, typer.Option(help="Tokens of prompt and response that are used.")] = 512,
    init: Annotated[
        Path | None, typer.Option(help="Drafter for MODEL to begin with, of the same shape (default: random weights).")
    ] = None,
    optimizer: Annotated[
        OptimizerName, typer.Option(help="muon steps matrices with Muon and the rest with AdamW.")
    ] = OptimizerName.MUON,
    rate: Annotated[
        float | None, typer.Option(help="Peak learning rate (default: 0.005 with muon, 0.001 with adamw).")
    ] = None,
    ema: Annotated[float, typer.Option(help="Share the average of weights keeps at every step; 0 for none.")] = 0.998,
    layers: Annotated[int, typer.Option(help="Decoder layers of the drafter.")] = 1,
    block: Annotated[int, typer.Option(help="Tokens drafted at once.")] = 5,
    taps: Annotated[str | None, typer.Option(help="Target layers it reads: 1,8,14 (default: five, evenly).")] = None,
    markov: Annotated[
        MarkovName, typer.Option(help="Head that corrects a slot by the token before.")
    ] = MarkovName.VANILLA,
    rank: Annotated[int, typer.Option(help="Rank of that head.")] = 32,
    intermediate: Annotated[
        int | None, typer.Option(help="Width of the drafter's feed-forward part (default: the target's).")
    ] = None,
    kv_heads: Annotated[
        int | None, typer.Option(help="Its key and value heads (default: as many as query heads).")
    ] = None,
    draft_vocab: Annotated[
        int | None, typer.Option(help="Draft only so many of the most frequent tokens (default: all).")
    ] = None,
    held_out: Annotated[int, typer.Option(help="Greedy responses kept for judging and calibration.")] = 64,
    evaluate_every: Annotated[int, typer.Option(help="Steps between evaluations; state is saved with them.")] = 200,
    dtype: Annotated[DtypeName, typer.Option(help="Arithmetic of training; weights are float32.")] = DtypeName.FLOAT32,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="Threads of PyTorch (default: all cores).")] = None,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")] = None,
    license_: Annotated[str | None, typer.Option("--license", help="For the model card.")] = None,
    base_model: Annotated[
        str | None, typer.Option(help="MODEL's name on a hub, for the card of one that lies in a folder or file.")
    ] = None,
    note: Annotated[str | None, typer.Option(help="On what it was trained with, for the model card.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the drafter in --out.")] = False,
    allow_unsafe_checkpoint: Annotated[
        bool,
        typer.Option(
            "--allow-unsafe-checkpoint", help="Run code that comes with the checkpoint. Only if you trust it."
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    progress: Annotated[ProgressName, typer.Option(help="Progress on stderr.")] = ProgressName.AUTO,
) -> None:
    """Train a drafter for MODEL; the same command continues a training that was interrupted."""
    from dspark_export.checkpoints.trust import Trust
    from dspark_export.train.asking import Plan
    from dspark_export.train.card import CardFacts
    from dspark_export.train.options import DrafterShape, TrainOptions
    from dspark_export.train.pipeline import DrafterJob
    from dspark_export.train.pipeline import train_drafter as run

    shape = DrafterShape(
        layers=layers,
        block=block,
        taps=None if taps is None else _numbers("--taps", taps, int),
        markov=markov.value,
        rank=rank,
        draft_vocab=draft_vocab,
        intermediate=intermediate,
        kv_heads=kv_heads,
    )
    options = TrainOptions(
        shape=shape,
        steps=steps,
        batch=batch,
        accumulate=accumulate,
        anchors=anchors,
        max_length=max_length,
        optimizer=optimizer.value,
        rate=rate,
        ema=ema,
        evaluate_every=evaluate_every,
        seed=seed,
        dtype=dtype.value,
    )
    generation = Plan(
        count=count,
        max_new_tokens=max_new_tokens,
        temperatures=_numbers("--temperatures", temperatures, float),
        synthesise=synthesise,
        seed=seed,
    )
    job = DrafterJob(
        model=model,
        out=out,
        work=work or out.with_name(f"{out.name}.work"),
        options=options,
        generation=generation,
        prompts=tuple(prompts or ()),
        responses=tuple(responses or ()),
        init=init,
        held_out=held_out,
        revision=revision,
        device=device,
        threads=threads,
        card=CardFacts(license_, base_model, note),
        overwrite=overwrite,
        trust=Trust.opened() if allow_unsafe_checkpoint else Trust.closed(),
    )
    with terminable(), _shown(progress) as on_progress:
        trained = run(job, on_progress)
    if as_json:
        typer.echo((trained.out / "training.json").read_text("utf-8").rstrip())
    else:
        _print(trained, model)


def _numbers(option: str, text: str, kind: Callable[[str], _Number]) -> tuple[_Number, ...]:
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(f"{option} {text}: give numbers with commas between them") from error


@contextmanager
def _shown(progress: ProgressName) -> Iterator[OnProgress]:
    if progress is ProgressName.JSON:

        def written(stage: str, done: int, whole: int, remark: str) -> None:
            line = {"stage": stage, "done": done, "of": whole, "remark": remark}
            print(json.dumps(line), file=sys.stderr, flush=True)

        yield written
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    hidden = progress is ProgressName.OFF or not console.is_terminal
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[remark]}"),
        console=console,
        disable=hidden,
    ) as bars:
        tasks: dict[str, TaskID] = {}

        def on_progress(stage: str, done: int, whole: int, remark: str) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(_DESCRIPTIONS[stage], total=whole, remark="")
            bars.update(tasks[stage], completed=done, total=whole, remark=remark)

        yield on_progress


def _print(trained: TrainedDrafter, model: str) -> None:
    from dspark_export.train.options import TREE

    before, after = trained.calibration_error
    typer.echo(f"trained {trained.out} in {sum(trained.seconds.values()):.0f} s")
    typer.echo(f"  size        {trained.parameters / 1e6:.2f} M parameters, {trained.steps} steps")
    typer.echo(
        f"  accepted    {trained.accepted_length:.2f} tokens per round on held-out responses "
        f"({trained.untrained_length:.2f} before this training), {trained.tree_length:.2f} with trees of {TREE} drafts"
    )
    typer.echo(f"  by slot     {'  '.join(f'{100 * share:.0f} %' for share in trained.survival)}")
    typer.echo(f"  calibration {100 * after:.1f} % error ({100 * before:.1f} % before)")
    typer.echo(f"use it:       dspark-export build {model} --draft {trained.out} --out BUNDLE")
