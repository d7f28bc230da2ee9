"""Runs every mode on every prompt, alternating, so that a machine that drifts slows all modes alike."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dspark_export.bench.prompts import PromptItem
from dspark_runtime import Bundle, Generation
from dspark_runtime.errors import UsageError

PLAIN = "off"


@dataclass
class Measured:
    """One mode on one prompt: decode tokens per second of every repeat, and the text of the first."""

    speeds: list[float] = field(default_factory=list)
    shares: list[tuple[float, float, float]] = field(default_factory=list)
    generation: Generation | None = None

    @property
    def speed(self) -> float:
        """Median over the repeats."""
        return statistics.median(self.speeds)


@dataclass(frozen=True)
class Divergence:
    """First token at which a mode left the plain text."""

    prompt: int
    position: int


@dataclass(frozen=True)
class ModeSummary:
    """One mode over one set of prompts. Ratios are to plain decoding, per prompt, of medians.

    ``draft``, ``verify`` and ``host`` are shares of decode time.
    """

    set: str
    mode: str
    tokens_per_second: float
    ratio: float
    worst_ratio: float
    accepted_length: float
    draft: float
    verify: float
    host: float
    equal: int
    prompts: int


@dataclass(frozen=True)
class BenchResult:
    """All summaries (per set, then over ``all``), and where texts differed."""

    summaries: list[ModeSummary]
    divergences: dict[str, list[Divergence]]


def run(
    bundle: Bundle,
    prompts: Sequence[PromptItem],
    modes: Sequence[str],
    *,
    max_new_tokens: int,
    repeats: int,
    on_step: Callable[[], None] = lambda: None,
) -> BenchResult:
    """Measure ``modes`` (plain decoding is always among them) on ``prompts``.

    Every mode has a schedule of its own, which learns over the prompts of this run and starts from the bundle's
    figures. ``on_step`` is called after every generation.
    """
    modes = [PLAIN, *(m for m in modes if m != PLAIN)]
    if repeats < 1 or not prompts:
        raise UsageError("a benchmark needs at least one prompt and one repeat")
    runs = {mode: bundle.with_fresh_schedule() for mode in modes}
    ids = [bundle.codec.encode_chat([{"role": "user", "content": item.text}]) for item in prompts]
    for mode in modes:  # load every graph, touch every buffer
        runs[mode].generate(ids[0], max_new_tokens=8, speculate=mode)
    runs = {mode: bundle.with_fresh_schedule() for mode in modes}
    measured = {mode: [Measured() for _ in prompts] for mode in modes}
    turn = 0
    for _ in range(repeats):
        for index, prompt in enumerate(ids):
            for mode in _rotated(modes, turn):
                generation = runs[mode].generate(prompt, max_new_tokens=max_new_tokens, speculate=mode)
                _record(measured[mode][index], generation)
                on_step()
            turn += 1
    return _summarize(prompts, modes, measured)


def _rotated(modes: Sequence[str], turn: int) -> list[str]:
    start = turn % len(modes)
    return [*modes[start:], *modes[:start]]


def _record(measured: Measured, generation: Generation) -> None:
    seconds = generation.stats.seconds
    if seconds.decode:
        measured.speeds.append(generation.stats.tokens_per_second)
        measured.shares.append(
            (seconds.draft / seconds.decode, seconds.verify / seconds.decode, seconds.host / seconds.decode)
        )
    else:  # the first token ended the text: no decoding to measure
        measured.speeds.append(float("nan"))
    if measured.generation is None:
        measured.generation = generation


def _summarize(prompts: Sequence[PromptItem], modes: Sequence[str], measured: dict[str, list[Measured]]) -> BenchResult:
    sets = list(dict.fromkeys(item.set for item in prompts))
    groups = [(name, [i for i, item in enumerate(prompts) if item.set == name]) for name in sets]
    if len(groups) > 1:
        groups.append(("all", list(range(len(prompts)))))
    divergences: dict[str, list[Divergence]] = {}
    for mode in modes[1:]:
        found = [_divergence(i, measured[PLAIN][i], measured[mode][i]) for i in range(len(prompts))]
        divergences[mode] = [item for item in found if item is not None]
    summaries = [
        _summary(name, mode, members, measured, divergences.get(mode, [])) for name, members in groups for mode in modes
    ]
    return BenchResult(summaries, divergences)


def _divergence(index: int, plain: Measured, other: Measured) -> Divergence | None:
    assert plain.generation is not None and other.generation is not None
    left, right = plain.generation.tokens, other.generation.tokens
    if left == right:
        return None
    position = next(
        (i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right))
    )
    return Divergence(index, position)


def _summary(
    name: str, mode: str, members: Sequence[int], measured: dict[str, list[Measured]], differing: Sequence[Divergence]
) -> ModeSummary:
    own = [measured[mode][i] for i in members]
    plain = [measured[PLAIN][i] for i in members]
    pairs = [(o.speed, p.speed) for o, p in zip(own, plain, strict=True) if o.speed == o.speed and p.speed == p.speed]
    ratios = [o / p for o, p in pairs] or [float("nan")]
    shares = [share for item in own for share in item.shares] or [(float("nan"),) * 3]
    stats = [item.generation.stats for item in own if item.generation is not None]
    rounds = sum(s.rounds for s in stats)
    draft, verify, host = (float(np.mean(column)) for column in zip(*shares, strict=True))
    gone = {item.prompt for item in differing}
    return ModeSummary(
        set=name,
        mode=mode,
        tokens_per_second=_geometric_mean([o for o, _ in pairs]),
        ratio=_geometric_mean(ratios),
        worst_ratio=min(ratios),
        accepted_length=sum(s.emitted - 1 for s in stats) / rounds if rounds else 0.0,
        draft=draft,
        verify=verify,
        host=host,
        equal=sum(i not in gone for i in members),
        prompts=len(members),
    )


def _geometric_mean(values: Sequence[float]) -> float:
    return float(np.exp(np.mean(np.log(values)))) if len(values) else float("nan")


def to_json(result: BenchResult) -> dict[str, Any]:
    """Plain data for JSON."""
    return {
        "summaries": [vars(summary) for summary in result.summaries],
        "divergences": {mode: [vars(item) for item in found] for mode, found in result.divergences.items()},
    }
