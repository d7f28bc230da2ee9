"""``dspark-export build``: a model becomes a bundle."""

from __future__ import annotations

import json
import logging
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dspark_export.cli.compile import BackendName, PluginsName, describe
from dspark_runtime.bundle.precisions import BLOCKED, PRECISIONS, QUANTIZED, Activations, Weights, listed

if TYPE_CHECKING:
    from dspark_export.build.pipeline import BuildResult, Stage

_QUANTIZED, _BLOCKED = ", ".join(QUANTIZED), ", ".join(BLOCKED)
_BLOCKS = ", ".join(str(PRECISIONS[name].block) for name in BLOCKED)
_INTEGERS = ", ".join(name for name, kind in PRECISIONS.items() if kind.integer_products)
_DEAR = listed((name for name, kind in PRECISIONS.items() if not kind.exact_by_default), "and")
TERMINATED = 143
DESCRIPTIONS = {
    "check": "checking the checkpoint",
    "load": "loading weights",
    "self-draft": "choosing self-draft layers",
    "trace": "tracing graphs",
    "optimize": "rewriting graphs",
    "save": "writing graphs and weights",
    "tokenizer": "writing the tokenizer",
    "measure": "measuring step costs",
    "compile": "compiling engines",
    "commit": "hashing and committing",
}


class ProgressName(StrEnum):
    """Values of ``--progress``: ``auto`` draws on a terminal only, ``json`` writes one line per stage."""

    AUTO = "auto"
    JSON = "json"
    OFF = "off"


def build(
    model: Annotated[str, typer.Argument(help="Hub id, folder with config.json, or .gguf file.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the new bundle.", show_default=False)],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")] = None,
    precision: Annotated[
        Weights, typer.Option(help=f"How weights are stored; {_INTEGERS}: with integer arithmetic on the CPU.")
    ] = "fp32",
    quantize_head: Annotated[bool, typer.Option(help=f"{_QUANTIZED}: quantize the output head too.")] = True,
    quantize_embedding: Annotated[
        bool | None,
        typer.Option(
            "--quantize-embedding/--no-quantize-embedding",
            help=f"{_QUANTIZED}: quantize the embedding too (default: unless --activations are fp16 or bf16).",
            show_default=False,
        ),
    ] = None,
    block_size: Annotated[int | None, typer.Option(help=f"{_BLOCKED}: weights per scale (default: {_BLOCKS}).")] = None,
    activations: Annotated[
        Activations | None,
        typer.Option(help=f"{_BLOCKED}: what the graph computes in (default: fp32; fp16 with --backend)."),
    ] = None,
    exact: Annotated[
        bool | None,
        typer.Option(
            "--exact/--no-exact",
            help="Never run a row alone, so that speculation cannot change a rounding (default: but for "
            f"{_DEAR} without --draft).",
            show_default=False,
        ),
    ] = None,
    self_draft: Annotated[str, typer.Option(help="auto, none, or layers=0-9,20 or layers=every=2.")] = "auto",
    draft: Annotated[
        list[str] | None,
        typer.Option(help="A model that drafts for it: DSpark, DFlash, EAGLE-3, or a small causal LM. Repeatable."),
    ] = None,
    draft_vocab: Annotated[
        Path | None, typer.Option(help="Ids that a block draft may draft: an .npy or a JSON list (default: all).")
    ] = None,
    markov_topk: Annotated[
        int | None, typer.Option(help="Correct only so many candidates per slot by the Markov head (default: all).")
    ] = None,
    allow_own_embeddings: Annotated[
        bool, typer.Option("--allow-own-embeddings", help="Use a draft's embeddings that differ from the target's.")
    ] = False,
    backend: Annotated[
        BackendName | None, typer.Option(help="Compile engines too, with default ranges; see `compile`.")
    ] = None,
    plugins: Annotated[
        PluginsName, typer.Option(help="--backend: how verification runs in engines; see `compile`.")
    ] = PluginsName.AUTO,
    threads: Annotated[
        int | None, typer.Option(help="Threads for measuring (default: OMP_NUM_THREADS or all cores).")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the bundle in --out.")] = False,
    allow_unsafe_checkpoint: Annotated[
        bool,
        typer.Option(
            "--allow-unsafe-checkpoint", help="Run code that comes with the checkpoint. Only if you trust it."
        ),
    ] = False,
    allow_untested_architecture: Annotated[
        bool,
        typer.Option("--allow-untested-architecture", help="Try an architecture no parity test covers."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    progress: Annotated[ProgressName, typer.Option(help="Progress on stderr.")] = ProgressName.AUTO,
) -> None:
    """Turn MODEL into a bundle: ONNX graphs, tokenizer, measured costs and a manifest."""
    from dspark_export.build.options import BuildOptions
    from dspark_export.build.pipeline import build as run
    from dspark_export.checkpoints.trust import Trust

    options = BuildOptions(
        model=model,
        out=out,
        revision=revision,
        precision=precision,
        quantize_head=quantize_head,
        quantize_embedding=quantize_embedding,
        block_size=block_size,
        exact=exact,
        self_draft=self_draft,
        drafts=tuple(draft or ()),
        draft_vocab=draft_vocab,
        markov_topk=markov_topk,
        allow_own_embeddings=allow_own_embeddings,
        threads=threads,
        overwrite=overwrite,
        trust=Trust.opened() if allow_unsafe_checkpoint else Trust.closed(),
        allow_untested=allow_untested_architecture,
        backend=None if backend is None else backend.value,
        plugins=plugins.value,
        activations=activations,
    )
    with terminable(), _shown(progress) as on_stage:
        _quiet_exporter()
        result = run(options, on_stage)
    if as_json:
        summary = {"bundle": str(result.out), "seconds": result.seconds, "manifest": result.manifest.model_dump()}
        typer.echo(json.dumps(summary))
    else:
        _print_summary(result)


def _quiet_exporter() -> None:
    """Without notes about operators of packages that are not installed; torch sets its log levels when imported."""
    import torch  # noqa: F401

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM unwinds a command like Ctrl-C does, so that nothing is left behind.

    SystemExit, because it is no Exception: whatever library is interrupted would take that for a failure of its own.
    """

    def stop(number: int, frame: object) -> None:
        raise SystemExit(TERMINATED)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _shown(progress: ProgressName) -> Iterator[Callable[[Stage], None]]:
    if progress is ProgressName.JSON:
        yield lambda stage: print(json.dumps({"stage": stage}), file=sys.stderr, flush=True)
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    hidden = progress is ProgressName.OFF or not console.is_terminal
    with Progress(
        SpinnerColumn(finished_text="✓"),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        console=console,
        disable=hidden,
    ) as bars:
        running: list[TaskID] = []

        def on_stage(stage: Stage) -> None:
            for task in running:
                bars.update(task, total=1, completed=1)
            running[:] = [bars.add_task(DESCRIPTIONS[stage], total=None)]

        yield on_stage
        for task in running:
            bars.update(task, total=1, completed=1)


def _print_summary(result: BuildResult) -> None:
    manifest = result.manifest
    size = sum(entry.size for entry in manifest.files.values())
    drafters = ", ".join(drafter.name for drafter in manifest.drafters)
    typer.echo(f"built {result.out} in {sum(result.seconds.values()):.0f} s")
    typer.echo(
        f"  model     {manifest.model.architecture}, {manifest.model.num_layers} layers, from {manifest.source.id}"
    )
    typer.echo(f"  precision {manifest.precision.weights}")
    typer.echo(f"  drafters  {drafters}")
    typer.echo(f"  size      {size / 1e6:.1f} MB in {len(manifest.files)} files")
    for engine in manifest.engines:
        typer.echo(f"  engine    {describe(engine)}")
    typer.echo(f'try it:     dspark-export generate {result.out} "Once upon a time"')
