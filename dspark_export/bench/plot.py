"""A picture of a benchmark: speed relative to plain decoding, by prompt set and mode."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dspark_export.bench.runner import PLAIN, ModeSummary
from dspark_runtime.errors import UsageError

_COLOURS = ("#3b6ea8", "#d1822b", "#5b9a5b", "#8a63a6", "#777777")


def plot(summaries: Sequence[ModeSummary], path: Path, title: str) -> None:
    """Write grouped bars of the ratio to plain decoding, with the worst prompt as a tick. Raises UsageError for a file
    that cannot be written or has no known suffix."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sets = list(dict.fromkeys(s.set for s in summaries))
    modes = [m for m in dict.fromkeys(s.mode for s in summaries) if m != PLAIN]
    by_key = {(s.set, s.mode): s for s in summaries}
    figure = Figure(figsize=(2.2 + 1.1 * len(sets) * max(1, len(modes)) * 0.6, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    width = 0.8 / max(1, len(modes))
    for m, mode in enumerate(modes):
        places = [i + (m - (len(modes) - 1) / 2) * width for i in range(len(sets))]
        ratios = [by_key[name, mode].ratio for name in sets]
        worst = [by_key[name, mode].worst_ratio for name in sets]
        bars = axes.bar(places, ratios, width * 0.92, label=mode, color=_COLOURS[m % len(_COLOURS)])
        axes.bar_label(bars, [f"{r:.2f}" for r in ratios], fontsize=8, padding=2)
        axes.plot(places, worst, "_", color="black", markersize=9, label="worst prompt" if m == 0 else None)
    axes.axhline(1.0, color="black", linewidth=0.8, linestyle="--")
    axes.set_xticks(range(len(sets)), sets)
    axes.set_ylabel("decode speed relative to plain")
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(y=0.12)
    figure.legend(loc="outside lower center", ncols=len(modes) + 1, frameon=False, fontsize=9)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"cannot write the plot {path}: {error}; name a file that ends in .png, .svg or .pdf"
        ) from error
