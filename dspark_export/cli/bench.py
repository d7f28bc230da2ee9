"""``dspark-export bench``: plain decoding against each way of speculating."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from dspark_export.cli.arguments import AsJson, BundleFolder, Exact, History, Threads
from dspark_export.cli.progress import bars
from dspark_export.prompts.sets import SHIPPED, load_sets
from dspark_runtime.errors import UsageError
from dspark_runtime.processors import default_threads, this_machine


def bench(
    bundle: BundleFolder,
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            "--prompts", "-p", help="Use a shipped set (repeat, code, math, chat; default: all) or a file. Repeatable."
        ),
    ] = None,
    modes: Annotated[
        str | None,
        typer.Option(help="Measure these modes, comma-separated, and plain decoding (default: all the bundle has)."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Generate at most this many tokens per prompt.")] = 128,
    repeats: Annotated[int, typer.Option(help="Run every prompt this many times in each mode; the median counts.")] = 3,
    limit: Annotated[int | None, typer.Option(min=1, help="Take this many prompts of each set (default: all).")] = None,
    threads: Threads = None,
    exact: Exact = None,
    history: History = True,
    plot: Annotated[Path | None, typer.Option(help="Write a picture: .png, .svg or .pdf.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure BUNDLE, plain and with each way of speculating, on the same prompts in one run.

    Speed is that of decoding, prefill excluded. Nothing else should be running meanwhile.
    """
    # numpy, onnx, pydantic: only when a bundle is measured
    from dspark_export.bench.bandwidth import bytes_per_token, measure_bandwidth
    from dspark_export.bench.report import Conditions, heading, over_all_sets, print_report, shown_summaries, to_json
    from dspark_export.bench.runner import checked_modes, modes_of, run
    from dspark_runtime import Bundle

    if plot is not None:
        _check_plot(plot)
    items = load_sets(prompts or list(SHIPPED), limit)
    opened = Bundle.open(bundle, threads=threads, exact=exact)
    named = [mode.strip() for mode in (modes or "").split(",") if mode.strip()]
    chosen = modes_of(opened) if modes is None else checked_modes(named, opened)
    machine = this_machine()
    used = threads or default_threads()
    noise = opened.manifest.precision.row_noise
    conditions = Conditions(
        bundle=str(bundle),
        model=opened.manifest.source.id,
        precision=opened.manifest.precision.weights,
        exact=opened.exact,
        row_noise=None if noise is None else noise.max_abs_logit_diff,
        cpu=machine.cpu,
        threads=used,
        max_new_tokens=max_new_tokens,
        repeats=repeats,
        weight_bytes_per_token=bytes_per_token(opened.files),
        bandwidth=measure_bandwidth(used),
    )
    with _progress(repeats * len(items) * len(chosen)) as step:
        result = run(
            opened, items, chosen, max_new_tokens=max_new_tokens, repeats=repeats, history=history, on_step=step
        )
    if plot is not None:
        # matplotlib: only for a plot
        from dspark_export.bench.plot import draw

        draw(shown_summaries(result), over_all_sets(result), plot, heading(conditions))
    if as_json:
        typer.echo(json.dumps(to_json(conditions, result)))
        return
    from rich.console import Console

    print_report(Console(width=max(104, Console().width)), conditions, result, opened)


def _check_plot(path: Path) -> None:
    """Before minutes of measuring, not after."""
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise UsageError(f"--plot {path}: name a file that ends in .png, .svg or .pdf")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"--plot {path}: there is no folder {path.absolute().parent}; make it first")


@contextmanager
def _progress(total: int) -> Iterator[Callable[[], None]]:
    """A progress bar on stderr; gives the function to call after each step."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("measuring"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with bars(*columns, transient=True) as shown:
        task = shown.add_task("", total=total)
        yield lambda: shown.advance(task)
