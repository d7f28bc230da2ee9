"""A picture of a benchmark: speed relative to plain decoding by prompt set and mode, and acceptance by depth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dspark_export.bench.runner import DrafterSummary, ModeSummary
from dspark_export.prompts.texts import PLAIN
from dspark_runtime.errors import UsageError

_COLOURS = ("#31688e", "#e08e3a", "#4f9d69", "#8661a8", "#8a8a8a")
_DEPTHS = 16  # drawn at most


def draw(summaries: Sequence[ModeSummary], over_all: Sequence[ModeSummary], path: Path, title: str) -> None:
    """Write grouped bars of the ratio to plain decoding, one group per set; a tick in each bar marks its worst prompt.

    Beside them, from ``over_all`` (one summary of each mode over all sets), what share of drafts survives to a depth.
    The suffix of ``path`` chooses the format. Raises UsageError if the file cannot be written.
    """
    sets = list(dict.fromkeys(s.set for s in summaries))
    modes = [mode for mode in dict.fromkeys(s.mode for s in summaries) if mode != PLAIN]
    drafters = [(s.mode, name, drafter) for s in over_all for name, drafter in s.drafters.items() if drafter.verified]
    bars = max(6.0, 1.8 + 0.55 * len(sets) * max(1, len(modes)))
    depths = 4.0 if drafters else 0.0
    figure = Figure(figsize=(bars + depths, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    if drafters:
        left, right = figure.subplots(1, 2, width_ratios=(bars, depths))
        _draw_depths(right, drafters, modes)
    else:
        left = figure.subplots()
    _draw_ratios(left, summaries, sets, modes)
    left.set_title(title, fontsize=9)
    figure.legend(loc="outside lower center", ncols=len(modes) + 1, frameon=False, fontsize=9)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot write the plot {path}: {error}") from error


def _draw_ratios(axes: Axes, summaries: Sequence[ModeSummary], sets: Sequence[str], modes: Sequence[str]) -> None:
    found = {(s.set, s.mode): s for s in summaries}
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
    _plain_frame(axes)
    axes.tick_params(axis="x", length=0)


def _draw_depths(axes: Axes, drafters: Sequence[tuple[str, str, DrafterSummary]], modes: Sequence[str]) -> None:
    """A line of each drafter in the colour of its mode, named at its end where a mode has several."""
    several = {mode for mode, _, _ in drafters if sum(m == mode for m, _, _ in drafters) > 1}
    for mode, name, drafter in drafters:
        survival = drafter.prefix_survival[:_DEPTHS]
        depths = range(1, len(survival) + 1)
        axes.plot(depths, survival, "o-", color=_COLOURS[modes.index(mode) % len(_COLOURS)], markersize=4, zorder=2)
        if mode in several:
            axes.annotate(name, (depths[-1], survival[-1]), (4, 0), textcoords="offset points", fontsize=7, va="center")
    axes.set_xlabel("depth of the draft")
    axes.set_ylabel("accepted with all drafts before it")
    axes.set_ylim(0.0, 1.02)
    axes.margins(x=0.12)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _plain_frame(axes)


def _plain_frame(axes: Axes) -> None:
    axes.grid(axis="y", color="#dddddd", zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
