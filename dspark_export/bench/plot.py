"""A picture of a benchmark: speed relative to plain decoding, by prompt set and mode."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dspark_export.bench.runner import PLAIN, ModeSummary
from dspark_runtime.errors import UsageError

_COLOURS = ("#31688e", "#e08e3a", "#4f9d69", "#8661a8", "#8a8a8a")


def draw(summaries: Sequence[ModeSummary], path: Path, title: str) -> None:
    """Write grouped bars of the ratio to plain decoding, one group per set; a tick in each bar marks its worst prompt.

    The suffix of ``path`` chooses the format. Raises UsageError if the file cannot be written.
    """
    sets = list(dict.fromkeys(s.set for s in summaries))
    modes = [mode for mode in dict.fromkeys(s.mode for s in summaries) if mode != PLAIN]
    found = {(s.set, s.mode): s for s in summaries}
    bars = len(sets) * max(1, len(modes))
    figure = Figure(figsize=(max(6.0, 1.8 + 0.55 * bars), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    width = 0.82 / max(1, len(modes))
    for m, mode in enumerate(modes):
        places = [i + (m - (len(modes) - 1) / 2) * width for i in range(len(sets))]
        ratios = [found[name, mode].ratio or 0.0 for name in sets]
        worst = [found[name, mode].worst_ratio or 0.0 for name in sets]
        drawn = axes.bar(places, ratios, width * 0.9, label=mode, color=_COLOURS[m % len(_COLOURS)], zorder=2)
        axes.bar_label(drawn, [f"{ratio:.2f}" for ratio in ratios], fontsize=8, padding=2)
        slowest = axes.plot(places, worst, "_", color="black", markersize=10, markeredgewidth=1.6, zorder=3)
        if m == len(modes) - 1:
            slowest[0].set_label("slowest prompt")
    axes.axhline(1.0, color="black", linewidth=1, linestyle="--", zorder=4)
    axes.annotate(
        "plain", (1.0, 1.0), (3, 0), xycoords=("axes fraction", "data"), textcoords="offset points", va="center"
    )
    axes.set_xticks(range(len(sets)), sets)
    axes.set_xlim(-0.55, len(sets) - 0.45)
    axes.set_ylim(bottom=0.0)
    axes.margins(y=0.1)
    axes.set_ylabel("decoding speed, plain = 1")
    axes.set_title(title, fontsize=9)
    axes.grid(axis="y", color="#dddddd", zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="x", length=0)
    figure.legend(loc="outside lower center", ncols=len(modes) + 1, frameon=False, fontsize=9)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot write the plot {path}: {error}") from error
