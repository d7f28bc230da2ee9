"""The report as one page without outside references, for a screen, a phone and paper."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Callable
from importlib.resources import files
from typing import Any

import matplotlib
import numpy as np
from jinja2 import Environment
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from dspark_export.validate.checks import FAMILIES, Check, Family, Report
from dspark_export.validate.speed import FORMULA

_TITLES: dict[Family, tuple[str, str]] = {
    "numerics": (
        "Numerics",
        "Graphs and weights against the model they were made from, on real texts: chunked prefill, a token tree, a "
        "chain, a single row, with their caches.",
    ),
    "losslessness": ("Losslessness", "Speculative text against plain text, and the rules that decide what is emitted."),
    "plumbing": (
        "Plumbing",
        "How often drafts are accepted. A broken drafter leaves the text right and shows only here.",
    ),
    "robustness": ("Robustness", "The runtime's arrangement of a pass must not change its logits."),
    "speed": (
        "Speed",
        f"What accepted lengths and pass costs predict, and what was measured: {FORMULA}. Texts are short and drafts "
        "of single drafters have a fixed length here; dspark-export bench measures speed as it is in use.",
    ),
}
_GOOD, _BAD, _GREY, _BLUE, _ORANGE = "#1d7a46", "#b3261e", "#9aa5b1", "#31688e", "#e08e3a"


def render(report: Report) -> str:
    """The page."""
    template = files("dspark_export.validate") / "page" / "report.html.jinja"
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    families = []
    for family in FAMILIES:
        checks = [check for check in report.checks if check.family == family]
        if checks:
            title, text = _TITLES[family]
            shown = [_shown(check) for check in sorted(checks, key=lambda c: c.status != "failed")]
            families.append({"title": title, "text": text, "checks": shown, "figures": _figures(family, checks)})
    counts = Counter(check.status for check in report.checks)
    return environment.from_string(template.read_text("utf-8")).render(
        report=report, families=families, facts=_facts(report), counts=counts
    )


def _facts(report: Report) -> list[tuple[str, str]]:
    return [
        ("model", report.model),
        ("precision", report.precision + (", exact text" if report.exact else "")),
        ("compared with", report.against),
        ("level", f"{report.level}, {report.prompts} prompts"),
        ("machine", report.machine),
        ("tokens per round", ", ".join(f"{mode} {length:.2f}" for mode, length in report.acceptance.items()) or "none"),
    ]


def _shown(check: Check) -> dict[str, Any]:
    return {
        **check.model_dump(include={"id", "title", "status", "where", "message", "unit"}),
        "measured": "" if check.measured is None else f"{check.measured:.3g}",
        "limit": "" if check.limit is None else f"{check.limit:.3g}",
    }


# Figures -------------------------------------------------------------------------------------------------------------


def _figures(family: Family, checks: list[Check]) -> list[dict[str, str]]:
    drawn: list[tuple[str, Callable[[Axes], None], float]] = []
    if family in ("numerics", "robustness"):
        measured = [c for c in checks if c.measured is not None and c.limit]
        if measured:
            drawn.append(
                (
                    "Measured differences as shares of their limits; the line is the limit.",
                    lambda axes: _draw_shares(axes, measured),
                    0.9 + 0.27 * len(measured),
                )
            )
    coarse = next((c.data["coarsest"] for c in checks if c.id == "numerics.weights" and c.data.get("coarsest")), None)
    if coarse:
        drawn.append(
            (
                "The weights that quantization changes most.",
                lambda axes: _draw_weights(axes, coarse),
                0.9 + 0.24 * len(coarse),
            )
        )
    noise = next((c for c in checks if c.id == "losslessness.noise" and c.data.get("histogram")), None)
    if noise is not None:
        drawn.append(
            (
                "How far logits move when a pass has more rows than one. Texts can differ only where the two best "
                "tokens are closer than that.",
                lambda axes: _draw_noise(axes, noise),
                3.0,
            )
        )
    accepted = [c for c in checks if c.id.startswith("plumbing.acceptance.") and c.data.get("drafters")]
    if accepted:
        drawn.append(
            (
                "Share of rounds in which a draft and all before it are accepted; dashed: the PyTorch loop.",
                lambda axes: _draw_survival(axes, accepted, [c for c in checks if "pytorch" in c.data]),
                3.2,
            )
        )
    modes = [c for c in checks if c.family == "speed" and c.data.get("predicted")]
    if modes:
        drawn.append(
            (
                "Speed of each mode over plain decoding, predicted and measured.",
                lambda axes: _draw_speed(axes, modes),
                3.0,
            )
        )
    costs = next((c for c in checks if c.id == "speed.costs"), None)
    if costs is not None:
        drawn.append(
            (
                "Milliseconds of a target pass by its rows; no pass can be faster than memory lets the weights in.",
                lambda axes: _draw_costs(axes, costs),
                3.0,
            )
        )
    return [{"svg": _svg(draw, height), "caption": caption} for caption, draw, height in drawn]


def _svg(draw: Callable[[Axes], None], height: float) -> str:
    with matplotlib.rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10}):
        figure = Figure(figsize=(5.6, height), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        draw(axes)
        axes.spines[["top", "right"]].set_visible(False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    # Without its own size the picture takes the width of the page; ids must not clash with those of other pictures.
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    mark = f"f{abs(hash(svg)) % 10**8}-"
    return re.sub(r'(id="|href="#|url\(#)', lambda found: found.group(1) + mark, svg)


def _draw_shares(axes: Axes, checks: list[Check]) -> None:
    names = [check.id.split(".", 1)[1] for check in checks]
    shares = [max(1.5e-6, (check.measured or 0.0) / (check.limit or 1.0)) for check in checks]
    places = np.arange(len(checks))[::-1]
    axes.barh(places, shares, color=[_BAD if c.status == "failed" else _GOOD for c in checks], height=0.62, left=0)
    axes.set_xscale("log")
    axes.set_xlim(1e-6, max(3.0, 3 * max(shares)))
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_yticks(places, names, fontsize=9)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("measured / limit")


def _draw_weights(axes: Axes, coarse: dict[str, float]) -> None:
    items = list(coarse.items())
    places = np.arange(len(items))[::-1]
    axes.barh(places, [value for _, value in items], color=_BLUE, height=0.62)
    axes.set_yticks(places, [name for name, _ in items], fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("root mean square of the change, relative")


def _draw_noise(axes: Axes, check: Check) -> None:
    edges = np.array(check.data["edges"])
    centres = np.sqrt(np.maximum(edges[:-1], 1e-9) * edges[1:])
    for number, (rows, counts) in enumerate(check.data["histogram"].items()):
        share = np.array(counts) / max(1, sum(counts))
        axes.plot(
            centres,
            share,
            drawstyle="steps-mid",
            label=f"{rows} rows",
            color=matplotlib.colormaps["viridis"](number / 5),
        )
    axes.set_xscale("log")
    axes.set_xlabel("difference of a logit; the leftmost step: none")
    axes.set_ylabel("share of logits")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.legend(frameon=False, fontsize=9)


def _draw_survival(axes: Axes, checks: list[Check], references: list[Check]) -> None:
    pytorch = {check.id.rsplit(".", 1)[1]: check.data["pytorch"] for check in references}
    palette = (_BLUE, _ORANGE, "#4f9d69", "#8661a8", "#8a8a8a")
    for number, check in enumerate(checks):
        mode = check.id.rsplit(".", 1)[1]
        for name, drafter in check.data["drafters"].items():
            survival, colour = drafter["survival"], palette[number % len(palette)]
            axes.plot(range(1, len(survival) + 1), survival, "o-", color=colour, label=mode, markersize=4)
            if name in pytorch:
                axes.plot(range(1, len(pytorch[name]) + 1), pytorch[name], "--", color=colour, linewidth=1)
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("depth of the draft")
    axes.set_ylabel("accepted with all before it")
    axes.legend(frameon=False, fontsize=9)


def _draw_speed(axes: Axes, checks: list[Check]) -> None:
    places = np.arange(len(checks))
    for shift, key, colour in ((-0.2, "predicted", _GREY), (0.2, "measured", _BLUE)):
        values = [float(check.data[key] or 0.0) for check in checks]
        bars = axes.bar(places + shift, values, 0.38, color=colour, label=key)
        axes.bar_label(bars, [f"{value:.2f}" for value in values], fontsize=8.5, padding=2)
    axes.axhline(1.0, color="black", linewidth=1, linestyle="--")
    axes.set_xticks(places, [check.id.split(".", 1)[1] for check in checks])
    axes.set_ylabel("plain decoding = 1")
    axes.margins(y=0.3)
    axes.tick_params(axis="x", labelrotation=20)
    axes.legend(frameon=False, fontsize=9, loc="upper right", ncols=2)


def _draw_costs(axes: Axes, check: Check) -> None:
    rows = check.data["rows"]
    axes.plot(rows, check.data["now_ms"], "o-", color=_BLUE, label="now")
    built = [(r, ms) for r, ms in zip(rows, check.data["built_ms"], strict=True) if ms]
    if built:
        axes.plot(*zip(*built, strict=True), "s--", color=_GREY, label="when it was built", markersize=4)
    axes.axhline(check.data["limit_ms"], color="black", linewidth=1, linestyle=":", label="limit of the memory")
    axes.set_xscale("log", base=2)
    axes.set_xticks(rows, [str(r) for r in rows])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("rows of a pass")
    axes.set_ylabel("ms")
    axes.legend(frameon=False, fontsize=9)
