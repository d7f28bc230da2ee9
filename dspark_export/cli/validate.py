"""``dspark-export validate``: proves a bundle right, and says where it is not."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dspark_export.cli.arguments import AsJson, BundleFolder, Progress, Revision, Threads, UnsafeCheckpoint
from dspark_export.cli.progress import ProgressForm, bars, write_step
from dspark_export.validate.extent import Against, Level
from dspark_runtime.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from dspark_export.validate.checks import Report

FAILED = 10
"""Exit code of a validation with a failed check."""


def validate(
    bundle: BundleFolder,
    against: Annotated[
        Against | None,
        typer.Option(
            help="Compare graphs with the model in PyTorch, with their standard forms in ONNX Runtime, engines with "
            "ONNX Runtime, or a GGUF file's model with llama.cpp too (default: torch where the model can be found, "
            "else onnxruntime).",
            show_default=False,
        ),
    ] = None,
    level: Annotated[Level, typer.Option(help="Run quick checks (minutes), or all of them.")] = "quick",
    prompts: Annotated[
        list[str] | None,
        typer.Option("--prompts", "-p", help="Use a shipped set or a file instead of a few of each. Repeatable."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Compare with this checkpoint (default: the hub model the bundle names).")
    ] = None,
    revision: Revision = None,
    draft: Annotated[
        list[str] | None,
        typer.Option("--draft", help="Compare a drafter of the bundle with its checkpoint. Repeatable."),
    ] = None,
    floors: Annotated[
        Path | None,
        typer.Option(help="Require the accepted lengths of this report or bundle (default: those of BUNDLE)."),
    ] = None,
    exact: Annotated[
        bool | None,
        typer.Option("--exact/--no-exact", help="Open the bundle with this setting (default: its own setting)."),
    ] = None,
    threads: Threads = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write the report into this folder; leave the bundle as it is.")
    ] = None,
    polygraphy_script: Annotated[
        Path | None,
        typer.Option(
            help="Write a data loader with real inputs and a comparison script for Polygraphy into this folder, "
            "and do nothing else."
        ),
    ] = None,
    allow_unsafe_checkpoint: UnsafeCheckpoint = False,
    as_json: AsJson = False,
    progress: Progress = "auto",
) -> None:
    """Check that BUNDLE is still its model and that speculation keeps its text; exit code 10 if not.

    The report goes into the bundle, as JSON and as a page, and its verdict into the manifest.
    """
    # torch, onnxruntime, matplotlib: only when a bundle is validated
    from dspark_export.checkpoints.trust import Trust
    from dspark_export.validate.html import render
    from dspark_export.validate.options import ValidateOptions
    from dspark_export.validate.run import validate as run
    from dspark_export.validate.store import store, store_outside
    from dspark_runtime.bundle.files import BundleFiles

    if polygraphy_script is not None:
        # polygraphy: only for a script
        from dspark_export.validate.polygraphy_script import write_script

        for path in write_script(bundle, polygraphy_script, prompts or (), threads):
            typer.echo(str(path))
        return
    options = ValidateOptions(
        bundle=bundle,
        against=against,
        level=level,
        prompts=tuple(prompts or ()),
        model=model,
        revision=revision,
        drafts=tuple(draft or ()),
        threads=threads,
        exact=exact,
        floors={} if floors is None else _floors(floors),
        keep=None if out is None else out / "inputs",
        trust=Trust.opened() if allow_unsafe_checkpoint else Trust.closed(),
    )
    with _shown(progress) as on_step:
        report = run(options, on_step)
    page = render(report)
    places = store_outside(out, report, page) if out is not None else store(BundleFiles.open(bundle), report, page)
    if as_json:
        typer.echo(report.model_dump_json())
    else:
        from rich.console import Console

        console = Console()
        _print(console, report)
        console.print(f"report: {places['html']}", soft_wrap=True, highlight=False)
    if not report.passed:
        raise typer.Exit(FAILED)


def _floors(path: Path) -> dict[str, float]:
    """Accepted lengths by mode of a report, or of the validated bundle in a folder."""
    # pydantic: only when a bundle is opened
    from dspark_runtime.bundle.files import BundleFiles

    if path.is_dir():
        found = BundleFiles.open(path, verify=False).manifest.validation.get("acceptance")
    else:
        try:
            found = json.loads(path.read_text("utf-8")).get("acceptance")
        except (OSError, ValueError, AttributeError) as error:
            raise UsageError(f"--floors {path}: not a report of `dspark-export validate` ({error})") from error
    given = found if isinstance(found, dict) else {}
    lengths = {str(mode): float(length) for mode, length in given.items() if isinstance(length, int | float)}
    if not lengths or len(lengths) < len(given):
        raise UsageError(f"--floors {path}: it has no accepted lengths; validate it first")
    return lengths


def _print(console: Console, report: Report) -> None:
    marks = {"passed": "[green]ok[/]", "failed": "[red]FAILED[/]", "skipped": "[yellow]skipped[/]"}
    for check in report.checks:
        size = "" if check.measured is None else f" {check.measured:.3g}"
        limit = "" if check.limit is None else f" (limit {check.limit:.3g})"
        console.print(f"{marks[check.status]:<10} {check.id}{size}{limit}", soft_wrap=True, highlight=False)
        if check.status != "passed":
            if check.where:
                console.print(f"           at {check.where}", soft_wrap=True, highlight=False, markup=False)
            console.print(f"           {check.message}", soft_wrap=True, highlight=False, markup=False)
    failed = len(report.failures())
    verdict = f"[red]{failed} failed[/]" if failed else "[green]passed[/]"
    console.print(f"{verdict}: {len(report.checks)} checks in {report.seconds:.0f} s", highlight=False)


@contextmanager
def _shown(progress: ProgressForm) -> Iterator[Callable[[str, int, int], None]]:
    """A bar with the time that is left, or a line of JSON for every step."""
    if progress == "json":
        yield lambda what, done, whole: write_step(stage=what, done=done, of=whole)
        return
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with bars(*columns, form=progress, transient=True) as shown:
        task = shown.add_task("validating", total=None)
        yield lambda what, done, whole: shown.update(task, description=what, completed=done, total=whole)
