"""``dspark-export bench``: plain decoding against each way of speculating."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dspark_runtime.errors import UsageError

if TYPE_CHECKING:
    from dspark_export.bench.runner import BenchResult


def bench(
    bundle: Annotated[Path, typer.Argument(help="Folder of the bundle.", show_default=False)],
    prompts: Annotated[
        list[str] | None,
        typer.Option("--prompts", "-p", help="Shipped set (repeat, code, math, chat) or a file; may be repeated."),
    ] = None,
    modes: Annotated[str, typer.Option(help="Modes besides plain decoding, comma-separated.")] = "ngram,auto",
    max_new_tokens: Annotated[int, typer.Option(help="Tokens per generation.")] = 128,
    repeats: Annotated[int, typer.Option(help="Times every prompt runs; the median counts.")] = 3,
    limit: Annotated[int | None, typer.Option(help="Prompts of each set.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads (default: one per physical core).")] = None,
    exact: Annotated[
        bool | None,
        typer.Option("--exact/--no-exact", help="Speculative text equals plain text (default: the bundle's)."),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a picture (.png, .svg, .pdf).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Measure BUNDLE: tokens per second of decoding (prefill excluded), plain and with each mode, in one run."""
    import os

    from dspark_export.bench.bandwidth import bytes_per_token, read_bandwidth
    from dspark_export.bench.prompts import SHIPPED, load_sets
    from dspark_export.bench.runner import run, to_json
    from dspark_runtime import SPECULATION_MODES, Bundle

    chosen = [mode.strip() for mode in modes.split(",") if mode.strip()]
    for mode in chosen:
        if mode not in SPECULATION_MODES:
            raise UsageError(f"mode {mode!r} is unknown; choose from {', '.join(SPECULATION_MODES)}")
    items = load_sets(prompts or list(SHIPPED), limit)
    opened = Bundle.open(bundle, threads=threads, exact=exact)
    used = threads or len(os.sched_getaffinity(0))
    bandwidth = read_bandwidth(used)
    with _progress(repeats * len(items) * (1 + len([m for m in chosen if m != "off"]))) as step:
        result = run(opened, items, chosen, max_new_tokens=max_new_tokens, repeats=repeats, on_step=step)
    weights = bytes_per_token(opened.files)
    facts: dict[str, Any] = {
        "bundle": str(bundle),
        "model": opened.manifest.source.id,
        "precision": opened.manifest.precision.weights,
        "exact": opened.exact,
        "threads": used,
        "device": opened.manifest.costs.device if opened.manifest.costs else "",
        "bandwidth_bytes_per_second": bandwidth,
        "weight_bytes_per_token": weights,
        "plain_limit_tokens_per_second": bandwidth / weights,
        "max_new_tokens": max_new_tokens,
        "repeats": repeats,
    }
    if plot is not None:
        from dspark_export.bench.plot import plot as draw

        title = f"{facts['model']}, {facts['precision']}, {used} threads, {facts['device']}"
        draw(result.summaries, plot, title)
    if as_json:
        typer.echo(json.dumps(facts | to_json(result)))
    else:
        _print(facts, result)


def _progress(total: int) -> Any:
    """A progress bar on stderr, nothing when that is no terminal; gives the function to call after each step."""
    from contextlib import contextmanager

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    @contextmanager
    def shown() -> Any:
        console = Console(stderr=True)
        columns = (TextColumn("measuring"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
            task = progress.add_task("", total=total)
            yield lambda: progress.advance(task)

    return shown()


def _print(facts: dict[str, Any], result: BenchResult) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.print(
        f"{facts['model']}, {facts['precision']}{', exact' if facts['exact'] else ''}, {facts['threads']} threads, "
        f"{facts['device']}; decode only, median of {facts['repeats']}"
    )
    console.print(
        f"reading {facts['weight_bytes_per_token'] / 1e6:.0f} MB of weights per token at "
        f"{facts['bandwidth_bytes_per_second'] / 1e9:.1f} GB/s limits plain decoding to "
        f"{facts['plain_limit_tokens_per_second']:.0f} tokens/s"
    )
    table = Table("set", "mode", box=None, pad_edge=False)
    for column in ("tokens/s", "x plain", "worst", "accepted length", "draft", "verify", "host", "equal text"):
        table.add_column(column, justify="right")
    previous = None
    for s in result.summaries:
        if previous is not None and s.set != previous:
            table.add_section()
        table.add_row(
            s.set if s.set != previous else "",
            "plain" if s.mode == "off" else s.mode,
            *(_number(v) for v in (s.tokens_per_second, s.ratio, s.worst_ratio, s.accepted_length)),
            *(f"{v:.1%}" for v in (s.draft, s.verify, s.host)),
            f"{s.equal}/{s.prompts}",
        )
        previous = s.set
    console.print(table)
    if any(result.divergences.values()):
        console.print("Texts that differ left plain decoding at a near tie, if the bundle is not exact: see --exact.")


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"
