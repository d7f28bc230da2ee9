"""``dspark-export draft-trace``: the intermediates of a trained drafter's first rounds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from dspark_export.cli.arguments import BundleFolder, ConfidenceThreshold, DraftSampling, Seed, Temperature, Threads
from dspark_export.cli.generate import read_ids
from dspark_runtime.errors import UsageError


def draft_trace(
    bundle: BundleFolder,
    prompt_ids: Annotated[
        Path, typer.Option(help="Read the prompt's token ids: a JSON list, or whitespace-separated integers.")
    ],
    out: Annotated[Path, typer.Option(help="Write this .npz file.")],
    drafter: Annotated[
        str | None, typer.Option(help="Trace this drafter (default: the bundle's first trained drafter).")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Trace this many rounds.")] = 1,
    temperature: Temperature = 0.0,
    draft_sampling: DraftSampling = "coupled",
    confidence_threshold: ConfidenceThreshold = 0.0,
    draft_branches: Annotated[int, typer.Option(help="Draft this many candidates per slot; 1 is a chain.")] = 1,
    seed: Seed = 0,
    threads: Threads = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print names and shapes as JSON.")] = False,
) -> None:
    """Write every intermediate of the first rounds of a trained drafter of BUNDLE, by name, to an .npz file.

    For debugging a draft that is rarely right: compare the arrays with those of the code it was trained with.
    """
    # numpy, onnxruntime, pydantic: only when a bundle is run
    from dspark_export.drafts.trace import save_trace, trace_draft
    from dspark_runtime import Bundle
    from dspark_runtime.drafters.parts import DraftOptions
    from dspark_runtime.speculation.sampling import SamplingParams

    ids = read_ids(prompt_ids)
    if out.is_dir() or not out.parent.is_dir():
        raise UsageError(f"--out {out} cannot be written: name a file in a folder that exists")
    options = DraftOptions(draft_sampling, confidence_threshold, draft_branches)  # type: ignore[arg-type]  # it refuses others
    opened = Bundle.open(bundle, threads=threads)
    name = drafter or next((entry.name for entry in opened.manifest.drafters if entry.trained), "")
    arrays = trace_draft(
        opened,
        ids,
        name,
        rounds=rounds,
        options=options,
        params=SamplingParams(temperature),
        seed=seed,
    )
    save_trace(arrays, out)
    if as_json:
        typer.echo(json.dumps({key: list(array.shape) for key, array in arrays.items()}))
        return
    for key, array in arrays.items():
        typer.echo(f"{key:24} {array.dtype!s:8} {list(array.shape)}")
