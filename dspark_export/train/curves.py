"""A picture of a training: the terms of the loss, and what the drafter is worth on held-out responses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_TERMS = {
    "ce": ("cross-entropy", "#31688e"),
    "distance": ("distance of distributions", "#e08e3a"),
    "confidence": ("confidence", "#4f9d69"),
}
_SLOTS = ("#c2d8e8", "#8fb8d6", "#5d97c2", "#31688e", "#1d4a6b", "#0f2f49")


def draw_curves(log: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the lines of a training's log into ``path``, whose suffix chooses the format."""
    steps = [line for line in log if "loss" in line]
    judged = [line for line in log if "accepted_length" in line]
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for key, (name, colour) in _TERMS.items():
        values = np.array([line[key] for line in steps])
        if len(values):
            at = [line["step"] for line in steps]
            left.plot(at, values, color=colour, alpha=0.18, linewidth=0.8)
            left.plot(at, smoothed(values), color=colour, label=name, linewidth=1.6)
    left.set(xlabel="step", ylabel="mean over slots", title="terms of the loss", ylim=(0, None))
    left.legend(frameon=False, fontsize=8)
    at = [line["step"] for line in judged]
    slots = len(judged[0]["survival"]) if judged else 0
    below = np.ones(len(judged))
    for slot in range(slots):  # the accepted length is 1 plus the survival of every slot: stacked, they add up to it
        above = below + np.array([line["survival"][slot] for line in judged])
        right.fill_between(
            at, below, above, color=_SLOTS[min(slot, len(_SLOTS) - 1)], linewidth=0, label=f"slot {slot}"
        )
        below = above
    right.plot(at, below, color="black", linewidth=1.4, marker="o", markersize=2.5)
    if judged:
        right.annotate(
            f"{below[-1]:.2f}", (at[-1], below[-1]), xytext=(0, 6), textcoords="offset points", ha="right", fontsize=9
        )
    right.set(
        xlabel="step", ylabel="tokens per round, bonus included", title="accepted length, held out", ylim=(1, None)
    )
    right.margins(x=0)
    right.legend(frameon=False, fontsize=8, loc="upper left")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.title.set_fontsize(10)
    figure.savefig(path, dpi=130)


def smoothed(values: np.ndarray) -> np.ndarray:
    """A running mean over about a twentieth of all steps, shorter at both ends; as long as ``values``."""
    width = max(1, len(values) // 20)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.minimum(np.arange(1, len(values) + 1) + width // 2, len(values))
    starts = np.maximum(ends - width, 0)
    out: np.ndarray = (sums[ends] - sums[starts]) / (ends - starts)
    return out
