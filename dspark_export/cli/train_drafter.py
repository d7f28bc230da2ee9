"""``dspark-export train-drafter``: a DSpark drafter for a target that does not have one yet."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from dspark_export.cli.arguments import AsJson, Model, Progress, Revision, Seed, UnsafeCheckpoint
from dspark_export.cli.progress import ProgressForm, bars, terminable, write_step
from dspark_export.prompts import ROWS
from dspark_export.train.options import TREE, Arithmetic, DrafterShape, FeatureReader, Markov, Optimizer, TrainOptions
from dspark_runtime.errors import UsageError

if TYPE_CHECKING:
    from dspark_export.checkpoints.trust import Trust
    from dspark_export.train.card import TrainedDrafter
    from dspark_export.train.pipeline import OnProgress, WrittenAnswers

_Number = TypeVar("_Number")
_WRITER = "writer.dspark"

_DESCRIPTIONS = {
    "prompts": "letting the model ask",
    "responses": "letting the model answer",
    "features": "computing features",
    "training": "training",
}


def train_drafter(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="Write the drafter into this folder.", show_default=False)],
    work: Annotated[
        Path | None,
        typer.Option(help="Keep what later runs need in this folder (default: OUT with `.work` appended)."),
    ] = None,
    prompts: Annotated[
        list[Path] | None, typer.Option(help="Answer these prompts: lines, or JSON lines. Repeatable.")
    ] = None,
    synthesise: Annotated[int, typer.Option(help="Let the model write this many prompts itself.")] = 0,
    bundle: Annotated[
        Path | None,
        typer.Option(help="Let this bundle of MODEL write the texts (default: one in w8a8, built in --work)."),
    ] = None,
    answers: Annotated[
        Path | None, typer.Option(help="Keep the responses in this file, and continue from it (default: in --work).")
    ] = None,
    answers_only: Annotated[
        bool, typer.Option("--answers-only", help="Write the responses and train nothing.")
    ] = False,
    responses: Annotated[
        list[Path] | None,
        typer.Option(help="Train on token ids of prompts and responses instead of answering prompts. Repeatable."),
    ] = None,
    count: Annotated[int, typer.Option(help="Make this many responses.")] = 2000,
    max_new_tokens: Annotated[int, typer.Option(help="Generate at most this many tokens per response.")] = 256,
    features: Annotated[
        FeatureReader, typer.Option(help="Read them with the model, in float32, or with the bundle in its precision.")
    ] = "model",
    rows: Annotated[int, typer.Option(help="Write this many responses at once.")] = ROWS,
    actors: Annotated[
        int, typer.Option(help="Write responses with this many actors of Ray Data, a copy of the bundle in each.")
    ] = 0,
    temperatures: Annotated[str, typer.Option(help="Answer prompts at these temperatures, in turns.")] = "0,0.7",
    steps: Annotated[int, typer.Option(help="Train for this many steps.")] = 2000,
    batch: Annotated[int, typer.Option(help="Put this many responses into a pass.")] = 16,
    accumulate: Annotated[int, typer.Option(help="Run this many passes per step.")] = 1,
    anchors: Annotated[int, typer.Option(help="Train on this many blocks of each response.")] = 32,
    max_length: Annotated[int, typer.Option(help="Use this many tokens of a prompt and its response.")] = 512,
    init: Annotated[
        Path | None, typer.Option(help="Start from this drafter, of the same shape (default: random weights).")
    ] = None,
    optimizer: Annotated[
        Optimizer, typer.Option(help="muon: step matrices with Muon and the rest with AdamW.")
    ] = "muon",
    rate: Annotated[
        float | None, typer.Option(help="Set the peak learning rate (default: 0.005 with muon, 0.001 with adamw).")
    ] = None,
    ema: Annotated[
        float, typer.Option(help="Keep this share of the average of weights at every step; 0 for no average.")
    ] = 0.998,
    layers: Annotated[int, typer.Option(help="Give the drafter this many decoder layers.")] = 1,
    block: Annotated[int, typer.Option(help="Draft this many tokens at once.")] = 5,
    taps: Annotated[
        str | None, typer.Option(help="Read these target layers, such as 1,8,14 (default: five, evenly spaced).")
    ] = None,
    markov: Annotated[
        Markov, typer.Option(help="Correct each slot by the token before it with this head.")
    ] = "vanilla",
    rank: Annotated[int, typer.Option(help="Set the rank of that head.")] = 32,
    intermediate: Annotated[
        int | None, typer.Option(help="Set the width of the feed-forward part (default: the target's).")
    ] = None,
    kv_heads: Annotated[
        int | None, typer.Option(help="Set the number of key and value heads (default: as many as query heads).")
    ] = None,
    draft_vocab: Annotated[
        int | None, typer.Option(help="Draft only this many of the most frequent tokens (default: all).")
    ] = None,
    held_out: Annotated[int, typer.Option(help="Keep this many greedy responses for evaluation and calibration.")] = 64,
    evaluate_every: Annotated[int, typer.Option(help="Evaluate, and save the state, every this many steps.")] = 200,
    dtype: Annotated[Arithmetic, typer.Option(help="Compute in this type; weights stay in float32.")] = "float32",
    device: Annotated[str, typer.Option(help="Train on cpu or cuda.")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="Use this many threads in PyTorch (default: all cores).")] = None,
    seed: Seed = 0,
    revision: Revision = None,
    license_: Annotated[str | None, typer.Option("--license", help="Name this licence in the model card.")] = None,
    base_model: Annotated[
        str | None, typer.Option(help="Name this hub model in the card if MODEL is a folder or a file.")
    ] = None,
    note: Annotated[str | None, typer.Option(help="State in the model card what it was trained with.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the drafter in --out.")] = False,
    allow_unsafe_checkpoint: UnsafeCheckpoint = False,
    as_json: AsJson = False,
    progress: Progress = "auto",
) -> None:
    """Train a drafter for MODEL; the same command continues a training that was interrupted."""
    # torch, transformers: only when a drafter is trained
    from dspark_export.checkpoints.trust import Trust
    from dspark_export.train.asking import Plan
    from dspark_export.train.card import CardFacts
    from dspark_export.train.pipeline import DrafterJob, write_answers
    from dspark_export.train.pipeline import train_drafter as run

    shape = DrafterShape(
        layers=layers,
        block=block,
        taps=None if taps is None else _numbers("--taps", taps, int),
        markov=markov,
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
        optimizer=optimizer,
        rate=rate,
        ema=ema,
        evaluate_every=evaluate_every,
        seed=seed,
        dtype=dtype,
    )
    generation = Plan(
        count=count,
        max_new_tokens=max_new_tokens,
        rows=rows,
        actors=actors,
        temperatures=_numbers("--temperatures", temperatures, float),
        synthesise=synthesise,
        seed=seed,
    )
    work = work or out.with_name(f"{out.name}.work")
    trust = Trust.opened() if allow_unsafe_checkpoint else Trust.closed()
    job = DrafterJob(
        model=model,
        out=out,
        work=work,
        options=options,
        generation=generation,
        prompts=tuple(prompts or ()),
        bundle=bundle or (lambda: _writer(model, revision, work / _WRITER, init, threads, trust)),
        answers=answers,
        features=features,
        responses=tuple(responses or ()),
        init=init,
        held_out=held_out,
        revision=revision,
        device=device,
        threads=threads,
        card=CardFacts(license_, base_model, note),
        overwrite=overwrite,
        trust=trust,
    )
    with terminable(), _shown(progress) as on_progress:
        if answers_only:
            written = write_answers(job, on_progress)
        else:
            trained = run(job, on_progress)
    if answers_only:
        _print_answers(written, as_json)
        return
    if trained is None:  # another process writes
        return
    if as_json:
        typer.echo((trained.out / "training.json").read_text("utf-8").rstrip())
    else:
        _print(trained, model)


def _writer(model: str, revision: str | None, out: Path, init: Path | None, threads: int | None, trust: Trust) -> Path:
    """A bundle of ``model`` that is quick with many texts at once; one that is there already is taken."""
    # onnx_ir: only when a bundle is built
    from dspark_export.build.options import BuildOptions
    from dspark_export.build.pipeline import build

    if not out.exists():
        drafts = () if init is None else (str(init),)
        build(
            BuildOptions(model, out, revision, "w8a8", self_draft="none", drafts=drafts, threads=threads, trust=trust)
        )
    return out


def _numbers(option: str, text: str, kind: Callable[[str], _Number]) -> tuple[_Number, ...]:
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(f"{option} {text}: give numbers with commas between them") from error


@contextmanager
def _shown(progress: ProgressForm) -> Iterator[OnProgress]:
    """A bar for every stage, or a line of JSON for every step."""
    if progress == "json":
        yield lambda stage, done, whole, remark: write_step(stage=stage, done=done, of=whole, remark=remark)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[remark]}"),
    )
    with bars(*columns, form=progress) as shown:
        tasks: dict[str, TaskID] = {}

        def on_progress(stage: str, done: int, whole: int, remark: str) -> None:
            if stage not in tasks:
                tasks[stage] = shown.add_task(_DESCRIPTIONS[stage], total=whole, remark="")
            shown.update(tasks[stage], completed=done, total=whole, remark=remark)

        yield on_progress


def _print_answers(written: WrittenAnswers, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({**asdict(written), "path": str(written.path)}))
        return
    rate = written.tokens / max(written.seconds, 1e-9)
    typer.echo(
        f"wrote {written.written} responses, {written.tokens} tokens, in {written.seconds:.0f} s: {rate:.0f} tokens/s"
    )
    typer.echo(f"  {written.responses} responses are in {written.path}, {written.path.stat().st_size / 1e6:.1f} MB")


def _print(trained: TrainedDrafter, model: str) -> None:
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
