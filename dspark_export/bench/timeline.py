"""A picture of some rounds: what the host and every stream did, on one time axis."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from dspark_export.bench.spans import BESIDE, HOST, Span

_LANES = (HOST, "draft", "target", "copy")
_COLOURS = {
    "propose": "#4c72b0",
    "fill": "#8c8c8c",
    "launch": "#c9b458",
    BESIDE: "#55a868",
    "wait": "#e6e6e6",
    "commit": "#8661a8",
    "pass": "#dd8452",
    "copy in": "#64b5cd",
    "copy out": "#2f6f8f",
    "move": "#c44e52",
}


def last_rounds(spans: Sequence[Span], count: int) -> list[Span]:
    """The spans that end in the last ``count`` rounds; a round begins with proposing."""
    begins = sorted(span.start for span in spans if (span.lane, span.what) == (HOST, "propose"))
    if not begins:
        return list(spans)
    since = begins[-min(count, len(begins))]
    return [span for span in spans if span.end >= since]


def draw_timeline(spans: Sequence[Span], path: Path, title: str) -> None:
    """A lane for the host and each kind of stream; ValueError without spans."""
    if not spans:
        raise ValueError("there is nothing to draw: no round was recorded")
    start = min(span.start for span in spans)
    lanes = [lane for lane in _LANES if any(span.lane == lane for span in spans)]
    figure = Figure(figsize=(12, 1.6 + 0.55 * len(lanes)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    kinds = [what for what in _COLOURS if any(span.what == what for span in spans)]
    for place, lane in enumerate(lanes):
        for what in kinds:
            bars = [
                ((span.start - start) * 1e3, (span.end - span.start) * 1e3)
                for span in spans
                if (span.lane, span.what) == (lane, what)
            ]
            axes.broken_barh(bars, (place - 0.4, 0.8), color=_COLOURS[what])
    axes.set_yticks(range(len(lanes)), lanes)
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds")
    axes.set_title(title, fontsize=10)
    patches = [Patch(color=_COLOURS[what], label=what) for what in kinds]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)


def host_microseconds(spans: Sequence[Span]) -> tuple[float, float]:
    """The host's work in a round and how much of it overlaps a pass; waiting, or running the pass, does not count."""
    rounds = sum((span.lane, span.what) == (HOST, "propose") for span in spans) or 1
    work = [span for span in spans if span.lane == HOST and span.what not in ("wait", "pass")]
    beside = sum(span.end - span.start for span in work if span.what == BESIDE)
    return sum(span.end - span.start for span in work) / rounds * 1e6, beside / rounds * 1e6
