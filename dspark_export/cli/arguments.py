"""Arguments and options shared by several commands, each with one help text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dspark_export.cli.progress import ProgressForm

BundleFolder = Annotated[Path, typer.Argument(help="Bundle folder.", show_default=False)]
Model = Annotated[str, typer.Argument(help="Hub id, folder with config.json, or .gguf file.", show_default=False)]
Revision = Annotated[str | None, typer.Option(help="Take this branch, tag or commit of a hub model.")]
Threads = Annotated[int | None, typer.Option(help="Use this many threads (default: OMP_NUM_THREADS or all cores).")]
Exact = Annotated[
    bool | None,
    typer.Option(
        "--exact/--no-exact", help="Keep speculative text equal to plain text (default: the bundle's setting)."
    ),
]
Seed = Annotated[int, typer.Option(help="Seed the random numbers.")]
Temperature = Annotated[float, typer.Option(help="Sample at this temperature; 0 is greedy.")]
DraftSampling = Annotated[
    str, typer.Option(help="With a temperature, let trained drafters draft coupled, greedy, or by rejection.")
]
ConfidenceThreshold = Annotated[
    float, typer.Option(help="Drop drafts from the first one of lower confidence on; 0 keeps all.")
]
UnsafeCheckpoint = Annotated[
    bool,
    typer.Option("--allow-unsafe-checkpoint", help="Run code that comes with the checkpoint. Only if you trust it."),
]
UntestedArchitecture = Annotated[
    bool, typer.Option("--allow-untested-architecture", help="Try an architecture no parity test covers.")
]
OwnEmbeddings = Annotated[
    bool,
    typer.Option("--allow-own-embeddings", help="Use a draft's own embeddings where they differ from the target's."),
]
Store = Annotated[
    Path | None,
    typer.Option("--store", help="Begin with the phrases of earlier requests in this file, and save them there."),
]
History = Annotated[bool, typer.Option("--history/--no-history", help="Draft from earlier requests.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Progress = Annotated[ProgressForm, typer.Option(help="Show progress on stderr.")]
