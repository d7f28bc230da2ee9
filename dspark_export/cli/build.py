"""``dspark-export build``: a model becomes a bundle."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dspark_export.cli.arguments import (
    AsJson,
    Model,
    OwnEmbeddings,
    Progress,
    Revision,
    UnsafeCheckpoint,
    UntestedArchitecture,
)
from dspark_export.cli.compile import describe
from dspark_export.cli.progress import ProgressForm, bars, terminable, write_step
from dspark_export.engines.options import PluginsOption
from dspark_runtime.backends.ort_kernels import HOW_TO_GET, kernel_library
from dspark_runtime.bundle.engine_names import Flavour
from dspark_runtime.bundle.precisions import BLOCKED, PRECISIONS, QUANTIZED, Activations, Weights, listed

if TYPE_CHECKING:
    from dspark_export.build.pipeline import BuildResult, Stage
    from dspark_runtime.bundle.manifest import Manifest

_QUANTIZED, _BLOCKED = ", ".join(QUANTIZED), ", ".join(BLOCKED)
_BLOCKS = ", ".join(str(PRECISIONS[name].block) for name in BLOCKED)
_INTEGERS = ", ".join(name for name, kind in PRECISIONS.items() if kind.integer_products)
_EXPENSIVE = listed(name for name, kind in PRECISIONS.items() if not kind.exact_by_default)
DESCRIPTIONS = {
    "check": "checking the checkpoint",
    "load": "loading weights",
    "self-draft": "choosing self-draft layers",
    "trace": "tracing graphs",
    "optimize": "rewriting graphs",
    "save": "writing graphs and weights",
    "tokenizer": "writing the tokenizer",
    "measure": "measuring step costs",
    "phrases": "letting the model write, for phrases",
    "compile": "compiling engines",
    "commit": "hashing and committing",
}


def build(
    model: Model,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Write the bundle into this folder (default: the model's name and .dspark)."),
    ] = None,
    revision: Revision = None,
    precision: Annotated[
        Weights, typer.Option(help=f"Store weights in this precision; {_INTEGERS}: with integer arithmetic on the CPU.")
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
    block_size: Annotated[
        int | None, typer.Option(help=f"{_BLOCKED}: scale this many weights together (default: {_BLOCKS}).")
    ] = None,
    activations: Annotated[
        Activations | None,
        typer.Option(help=f"{_BLOCKED}: compute in this type (default: fp32; fp16 with --backend)."),
    ] = None,
    kernels: Annotated[
        bool | None,
        typer.Option(
            "--kernels/--no-kernels",
            help="Add a form of each graph for the sequence kernels (CPU), and store weights in their layout (default: "
            "without --backend, where this installation has the kernels).",
            show_default=False,
        ),
    ] = None,
    exact: Annotated[
        bool | None,
        typer.Option(
            "--exact/--no-exact",
            help="Never run a row alone, so that speculation cannot change a rounding (default: unless the precision "
            f"is {_EXPENSIVE} without a --draft).",
            show_default=False,
        ),
    ] = None,
    self_draft: Annotated[
        str, typer.Option(help="Draft with these layers: auto, none, layers=0-9,20 or layers=every=2.")
    ] = "auto",
    draft: Annotated[
        list[str] | None,
        typer.Option(help="Add a model that drafts: DSpark, DFlash, EAGLE-3, or a small causal LM. Repeatable."),
    ] = None,
    draft_vocab: Annotated[
        Path | None,
        typer.Option(help="Let a block draft use these ids only: an .npy file or a JSON list (default: all)."),
    ] = None,
    markov_topk: Annotated[
        int | None, typer.Option(help="Correct this many candidates per slot by the Markov head (default: all).")
    ] = None,
    allow_own_embeddings: OwnEmbeddings = False,
    phrases: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Let the model answer this many prompts of its own, to draft from its answers; 0 for none (default: "
            "for two minutes; 0 with --backend).",
            show_default=False,
        ),
    ] = None,
    backend: Annotated[
        Flavour | None, typer.Option(help="Compile engines too, with default ranges; see `compile`.")
    ] = None,
    plugins: Annotated[
        PluginsOption, typer.Option(help="With --backend: choose how engines verify; see `compile`.")
    ] = "auto",
    threads: Annotated[
        int | None, typer.Option(help="Measure with this many threads (default: OMP_NUM_THREADS or all cores).")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the bundle in --out.")] = False,
    allow_unsafe_checkpoint: UnsafeCheckpoint = False,
    allow_untested_architecture: UntestedArchitecture = False,
    as_json: AsJson = False,
    progress: Progress = "auto",
) -> None:
    """Turn MODEL into a bundle: ONNX graphs, tokenizer, measured costs and a manifest."""
    # numpy, onnx_ir, pydantic: only when a bundle is built
    from dspark_export.build.options import BuildOptions
    from dspark_export.build.pipeline import build as run
    from dspark_export.checkpoints.trust import Trust

    if out is None:
        out = default_out(model)
        typer.echo(f"the bundle goes to {out}; --out names another folder", err=True)
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
        backend=backend,
        plugins=plugins,
        activations=activations,
        kernels=kernels,
        phrases=0 if phrases is None and backend is not None else phrases,
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


def default_out(model: str) -> Path:
    """``NAME.dspark`` in the current folder, where NAME is the last part of a hub id or a path, without ``.gguf``."""
    path = Path(model)
    name = path.stem if path.suffix.lower() == ".gguf" else path.name or path.resolve().name
    return Path(f"{name}.dspark")


@contextmanager
def _shown(progress: ProgressForm) -> Iterator[Callable[[Stage], None]]:
    """A line with the time for every stage, or a line of JSON."""
    if progress == "json":
        yield lambda stage: write_step(stage=stage)
        return
    from rich.progress import SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(finished_text="✓"), TextColumn("{task.description}"), TimeElapsedColumn())
    with bars(*columns, form=progress) as shown:
        running: list[TaskID] = []

        def finish() -> None:
            for task in running:
                shown.update(task, total=1, completed=1)

        def on_stage(stage: Stage) -> None:
            finish()
            running[:] = [shown.add_task(DESCRIPTIONS[stage], total=None)]

        yield on_stage
        finish()


def _kernels(manifest: Manifest) -> str:
    """Whether CPU graphs run on the sequence kernels, and how they would."""
    library = kernel_library()
    if any(graph.kernels for graph in manifest.graphs):
        return "none here" if library is None else f"{library.instruction_set}, sequence kernels"
    return f"none; {HOW_TO_GET}, and build again" if library is None else "none"


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
    typer.echo(f"  kernels   {_kernels(manifest)}")
    typer.echo(f"  size      {size / 1e6:.1f} MB in {len(manifest.files)} files")
    for engine in manifest.engines:
        typer.echo(f"  engine    {describe(engine)}")
    typer.echo(f'try it:     dspark-export generate {result.out} "Once upon a time"')
