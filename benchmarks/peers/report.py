"""The result as a table, as JSON and as a picture."""

from __future__ import annotations

import platform
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.peers.measure import Measured, fastest_own, geometric_mean, own_results, ratios, shared_prefix
from benchmarks.peers.own import PLAIN_EXACT, SETTINGS
from dspark_export.bench.bandwidth import Bandwidth
from dspark_runtime.processors import Machine

_PACKAGES = (
    "dspark-export",
    "onnxruntime",
    "onnxruntime-genai",
    "openvino-genai",
    "xllamacpp",
    "transformers",
    "torch",
)


@dataclass(frozen=True)
class Conditions:
    """What a run was made with. Bandwidth is in bytes per second, ``weight_bytes`` those one decoding step reads,
    ``products`` multiply-adds of float32 numbers per second."""

    model: str
    machine: Machine
    threads: int
    bandwidth: Bandwidth
    weight_bytes: dict[str, int]
    products: float
    prompts: list[str]
    prompt_tokens: list[int]
    max_new_tokens: int
    repeats: int

    @property
    def limits(self) -> dict[str, float]:
        """Tokens per second that plain decoding cannot exceed while every step reads all weights, by precision."""
        return {precision: self.bandwidth.read / size for precision, size in self.weight_bytes.items()}


def versions() -> dict[str, str]:
    """Versions of the packages compared; those not installed are left out."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def to_json(conditions: Conditions, results: Sequence[Measured], missing: dict[str, str]) -> dict[str, Any]:
    """Everything measured; speeds are tokens per second."""
    fastest = fastest_own(results)
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        **asdict(conditions),
        "plain_limit_tokens_per_second": conditions.limits,
        "peers": [_peer_json(result, results, fastest) for result in results],
        "missing": missing,
    }


def _peer_json(result: Measured, results: Sequence[Measured], fastest: Measured | None) -> dict[str, Any]:
    own = own_results(results, result.peer.family)
    compared = {} if result.peer.setting is not None else {s: ratios(mine, result) for s, mine in own.items()}
    return {
        "name": result.peer.name,
        "precision": result.peer.precision,
        "compared_with": result.peer.family,
        "decode_tokens_per_second": geometric_mean(result.speeds()),
        "decode_tokens_per_second_by_prompt": result.speeds(),
        "total_tokens_per_second": geometric_mean(result.totals()),
        "prefill_ms_median": result.prefill_ms(),
        "new_tokens_by_prompt": [len(runs[0].tokens) for runs in result.runs],
        "agrees_with_dspark_for_tokens": _agreement(result, own),
        "dspark_ratio": {setting: geometric_mean(values) for setting, values in compared.items()},
        "dspark_ratio_by_prompt": compared,
        "dspark_fastest": _over_fastest(result, fastest),
    }


def _over_fastest(result: Measured, fastest: Measured | None) -> dict[str, Any] | None:
    """How much faster the fastest of this project is; None for its own results."""
    if fastest is None or result.peer.setting is not None:
        return None
    by_prompt = ratios(fastest, result)
    return {"name": fastest.peer.name, "ratio": geometric_mean(by_prompt), "by_prompt": by_prompt}


def _agreement(result: Measured, own: dict[str, Measured]) -> list[int] | None:
    if PLAIN_EXACT not in own:
        return None
    pairs = ((own[PLAIN_EXACT].tokens(i), result.tokens(i)) for i in range(len(result.runs)))
    return [shared_prefix(mine, theirs) for mine, theirs in pairs]


def print_report(
    console: Console, conditions: Conditions, results: Sequence[Measured], missing: dict[str, str]
) -> None:
    """Table, limits set by memory, and what is missing."""
    console.print(heading(conditions), style="bold", highlight=False, markup=False)
    table = Table(box=None, pad_edge=False)
    table.add_column("peer")
    for column in ("tokens/s", "with\nprefill", "prefill\nms", "tokens\nagree"):
        table.add_column(column, justify="right")
    for setting in SETTINGS:
        table.add_column(f"dspark\n{setting.replace(', ', chr(10))}", justify="right")
    table.add_column("dspark\nfastest", justify="right")
    fastest = fastest_own(results)
    for result in results:
        own = own_results(results, result.peer.family)
        agreement = _agreement(result, own)
        cells = [_number(geometric_mean(result.speeds())), _number(geometric_mean(result.totals()))]
        cells += [f"{result.prefill_ms():.0f}", "-" if agreement is None else f"{sum(agreement)}/{_most(result)}"]
        for setting in SETTINGS:
            if result.peer.setting is not None or setting not in own:
                cells.append("")
            else:
                cells.append(_number(geometric_mean(ratios(own[setting], result)), 2))
        over = _over_fastest(result, fastest)
        cells.append("" if over is None else _number(over["ratio"], 2))
        table.add_row(escape(result.peer.name), *cells)
    console.print(table)
    console.print(_memory_line(conditions), highlight=False)
    console.print(_products_line(conditions), highlight=False)
    console.print(_version_line(), highlight=False)
    console.print(
        "tokens/s: decoding alone, geometric mean over prompts of the medians over repeats. dspark columns: its speed "
        "over the peer's, geometric mean over prompts, in the peer's precision and, last, in that which is fastest of "
        "all. tokens agree: new tokens before the first difference from dspark plain, exact.",
        style="dim",
        highlight=False,
    )
    for name, reason in missing.items():
        console.print(f"left out: {name}: {reason}", highlight=False, markup=False)


def heading(conditions: Conditions) -> str:
    """One line that names model and machine."""
    machine = conditions.machine
    return (
        f"{Path(conditions.model).name}, {conditions.threads} threads of {machine.cpu} "
        f"({machine.physical_cores} cores), {len(conditions.prompts)} prompts, {conditions.max_new_tokens} new tokens, "
        f"{conditions.repeats} repeats, {datetime.now(UTC):%Y-%m-%d}"
    )


def draw(conditions: Conditions, results: Sequence[Measured], path: Path) -> None:
    """Bars of decode speed, with the limits of memory as lines; the suffix of ``path`` chooses the format."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 2.2 + 0.34 * len(results)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    ordered = sorted(results, key=lambda result: geometric_mean(result.speeds()) or 0.0)
    speeds = [geometric_mean(result.speeds()) or 0.0 for result in ordered]
    colours = ["#e08e3a" if result.peer.setting is not None else "#31688e" for result in ordered]
    bars = axes.barh([result.peer.name for result in ordered], speeds, color=colours, zorder=2)
    axes.bar_label(bars, [f"{speed:.1f}" for speed in speeds], padding=3, fontsize=8)
    for precision, limit in conditions.limits.items():
        if limit < 1.3 * max(speeds, default=0.0):
            axes.axvline(limit, color="black", linewidth=1, linestyle="--", zorder=3)
            axes.annotate(
                f"memory limit, {precision}",
                (limit, 0.01),
                (3, 0),
                xycoords=axes.get_xaxis_transform(),
                textcoords="offset points",
                rotation=90,  # limits of two precisions may be close to each other
                fontsize=7,
            )
    axes.margins(x=0.1)
    axes.set_xlabel("decoded tokens per second")
    facts = [*textwrap.wrap(heading(conditions), 110), _memory_line(conditions), *textwrap.wrap(_version_line(), 110)]
    figure.suptitle("\n".join(facts), fontsize=8, x=0.01, ha="left")
    axes.grid(axis="x", color="#dddddd", zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def _memory_line(conditions: Conditions) -> str:
    bandwidth = conditions.bandwidth
    limits = ", ".join(f"{precision} {limit:.0f}" for precision, limit in conditions.limits.items())
    return (
        f"memory: read {bandwidth.read / 1e9:.1f} GB/s, triad {bandwidth.triad / 1e9:.1f} GB/s; "
        f"plain decoding cannot exceed, in tokens/s: {limits}"
    )


def _products_line(conditions: Conditions) -> str:
    line = f"products: {conditions.products / 1e9:.0f} G multiply-adds/s in float32"
    if "fp32" not in conditions.weight_bytes:
        return line
    each = conditions.weight_bytes["fp32"] / 4  # a product for each weight that is read
    most = conditions.products / each
    return f"{line}; a token has {each / 1e6:.0f} M: rows of a pass cannot exceed {most:.0f} a second"


def _version_line() -> str:
    return ", ".join(f"{package} {version}" for package, version in versions().items())


def _number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _most(result: Measured) -> int:
    return sum(len(runs[0].tokens) for runs in result.runs)
