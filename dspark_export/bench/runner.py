"""Runs every mode on every prompt, alternating, so that a machine that slows down affects all modes equally."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from dspark_export.prompts.sets import PromptItem
from dspark_export.prompts.texts import PLAIN, encode, first_difference
from dspark_runtime import Bundle, Generation
from dspark_runtime.decoding.statistics import Statistics
from dspark_runtime.errors import UsageError

ALL_SETS = "all"
_WARM_UP_TOKENS = 16


@dataclass
class Measured:
    """One mode on one prompt. ``speeds`` holds decode tokens per second of every repeat that decoded anything."""

    speeds: list[float] = field(default_factory=list)
    prefill_speeds: list[float] = field(default_factory=list)
    generations: list[Generation] = field(default_factory=list)

    def add(self, generation: Generation) -> None:
        """Take in one repeat."""
        stats = generation.stats
        if stats.rounds:
            self.speeds.append(stats.tokens_per_second)
        if stats.seconds.prefill:
            self.prefill_speeds.append(generation.prompt_tokens / stats.seconds.prefill)
        self.generations.append(generation)

    @property
    def speed(self) -> float | None:
        """Median over the repeats; None where the first token ended the text."""
        return statistics.median(self.speeds) if self.speeds else None


@dataclass(frozen=True)
class Divergence:
    """First token at which a mode left the plain text; a token is None where that text had ended already.

    ``prompt`` counts within its set from 0; ``position`` counts generated tokens from 0.
    """

    mode: str
    set: str
    prompt: int
    position: int
    plain_token: int | None
    token: int | None


@dataclass(frozen=True)
class DrafterSummary:
    """One drafter of a mode: what happened to its drafts, by depth of its main chain (its most likely tokens).

    ``verified``: rounds that verified a draft at a depth; ``conditional_acceptance``: share accepted where all drafts
    before it were; ``prefix_survival``: share of rounds in which everything up to it was. ``calibration_error``: of the
    drafter's own estimates of its survival, in [0, 1]; None if it makes none.
    """

    drafted: int
    accepted: int
    verified: list[int]
    conditional_acceptance: list[float]
    prefix_survival: list[float]
    calibration_error: float | None


@dataclass(frozen=True)
class ModeSummary:
    """One mode over one set of prompts.

    ``tokens_per_second`` is decoding alone, ``prefill_tokens_per_second`` the prompt alone: both geometric means over
    prompts of the medians over repeats. ``ratio`` is to plain decoding, likewise; ``worst_ratio`` is the lowest of a
    prompt. ``draft_ms``, ``verify_ms`` and ``host_ms`` are means of a round, ``*_share`` their parts of decode time.
    ``equal`` counts prompts whose tokens equal the plain ones in every repeat. None: nothing was decoded.
    ``accepted_length`` counts the correction or bonus token. ``drafters``: see :class:`DrafterSummary`.
    """

    set: str
    mode: str
    prompts: int
    equal: int
    tokens: int
    rounds: int
    tokens_per_second: float | None
    prefill_tokens_per_second: float | None
    ratio: float | None
    worst_ratio: float | None
    accepted_length: float
    draft_ms: float
    verify_ms: float
    host_ms: float
    draft_share: float
    verify_share: float
    host_share: float
    drafters: dict[str, DrafterSummary]


@dataclass(frozen=True)
class BenchResult:
    """Summaries per set and mode, those over ``all`` sets last, and where texts differed."""

    summaries: list[ModeSummary]
    divergences: list[Divergence]


def modes_of(bundle: Bundle) -> list[str]:
    """Plain decoding and every mode this bundle has graphs for."""
    return bundle.speculation_modes()


def checked_modes(names: Sequence[str], bundle: Bundle) -> list[str]:
    """The modes without repeats, plain first, which is always measured; drafters may be joined with ``+`` at will.

    Raises:
        UsageError: an unknown mode.
    """
    known = modes_of(bundle)
    drafters = {name for name in known if "+" not in name} - {"off", "auto"}
    for name in names:
        parts = name.split("+")
        if name not in known and not (len(set(parts)) == len(parts) and set(parts) <= drafters):
            raise UsageError(
                f"mode {name!r} is unknown; this bundle has {', '.join(known)}, and drafters joined with + at will"
            )
    return [PLAIN, *dict.fromkeys(name for name in names if name != PLAIN)]


def run(
    bundle: Bundle,
    prompts: Sequence[PromptItem],
    modes: Sequence[str],
    *,
    max_new_tokens: int,
    repeats: int,
    history: bool = True,
    on_step: Callable[[], None] = lambda: None,
) -> BenchResult:
    """Measure ``modes`` (:func:`checked_modes`) on ``prompts``, greedy, one prompt at a time.

    The modes share the loaded graphs, but each has its own schedule, which starts from the bundle's figures and
    learns over the prompts of this run. So does its store, from prompt to prompt of one repeat, unless ``history`` is
    False: then each prompt is drafted from itself and the bundle alone. Within each prompt the modes take turns, and
    another one begins each time. ``on_step`` is called after every generation.
    """
    if repeats < 1:
        raise UsageError(f"{repeats} repeats measure nothing; give at least 1")
    ids = [encode(bundle, item.text) for item in prompts]
    for mode in modes:  # loads every graph and commits its memory
        bundle.with_fresh_schedule().generate(ids[0], max_new_tokens=_WARM_UP_TOKENS, speculate=mode)
    runs = {mode: bundle.with_fresh_schedule() for mode in modes}
    measured = {mode: [Measured() for _ in prompts] for mode in modes}
    for repeat in range(repeats):
        for run_ in runs.values():  # or a text would be drafted from itself
            run_.phrases.forget()
        for index, prompt in enumerate(ids):
            for mode in _rotated(modes, repeat + index):
                if not history:
                    runs[mode].phrases.forget()
                generation = runs[mode].generate(prompt, max_new_tokens=max_new_tokens, speculate=mode)
                measured[mode][index].add(generation)
                on_step()
    return _summarize(prompts, modes, measured)


def _rotated(modes: Sequence[str], turn: int) -> list[str]:
    start = turn % len(modes)
    return [*modes[start:], *modes[:start]]


def _summarize(prompts: Sequence[PromptItem], modes: Sequence[str], measured: dict[str, list[Measured]]) -> BenchResult:
    sets = list(dict.fromkeys(item.set for item in prompts))
    groups = {name: [i for i, item in enumerate(prompts) if item.set == name] for name in sets}
    divergences = [
        Divergence(mode, name, place, *found)
        for mode in modes[1:]
        for name, members in groups.items()
        for place, i in enumerate(members)
        if (found := _divergence(measured[PLAIN][i], measured[mode][i])) is not None
    ]
    summaries = []
    for name, members in (groups | {ALL_SETS: list(range(len(prompts)))}).items():
        for mode in modes:
            differing = sum(d.mode == mode and name in (d.set, ALL_SETS) for d in divergences)
            plain, own = ([measured[m][i] for i in members] for m in (PLAIN, mode))
            summaries.append(_summary(name, mode, plain, own, differing))
    return BenchResult(summaries, divergences)


def _divergence(plain: Measured, other: Measured) -> tuple[int, int | None, int | None] | None:
    left = plain.generations[0].tokens
    for generation in other.generations:
        if (position := first_difference(left, generation.tokens)) is not None:
            return position, _token(left, position), _token(generation.tokens, position)
    return None


def _token(tokens: Sequence[int], position: int) -> int | None:
    return tokens[position] if position < len(tokens) else None


def _summary(name: str, mode: str, plain: Sequence[Measured], own: Sequence[Measured], differing: int) -> ModeSummary:
    pairs = [(o.speed, p.speed) for o, p in zip(own, plain, strict=True)]
    ratios = [o / p for o, p in pairs if o and p]
    stats = [generation.stats for item in own for generation in item.generations]
    rounds = sum(s.rounds for s in stats)
    seconds = {phase: sum(getattr(s.seconds, phase) for s in stats) for phase in ("draft", "verify", "host")}
    decode = sum(seconds.values()) or 1.0
    tokens = sum(s.emitted for s in stats)
    prefills = [statistics.median(item.prefill_speeds) for item in own if item.prefill_speeds]
    return ModeSummary(
        set=name,
        mode=mode,
        prompts=len(own),
        equal=len(own) - differing,
        tokens=tokens,
        rounds=rounds,
        tokens_per_second=_geometric_mean([o for o, _ in pairs if o]),
        prefill_tokens_per_second=_geometric_mean(prefills),
        ratio=_geometric_mean(ratios),
        worst_ratio=min(ratios, default=None),
        accepted_length=(tokens - len(stats)) / rounds if rounds else 0.0,
        **{f"{phase}_ms": 1e3 * spent / max(rounds, 1) for phase, spent in seconds.items()},
        **{f"{phase}_share": spent / decode for phase, spent in seconds.items()},
        drafters=_drafters(stats),
    )


def _drafters(stats: Sequence[Statistics]) -> dict[str, DrafterSummary]:
    return {
        name: DrafterSummary(
            drafted=counts.drafted,
            accepted=counts.accepted,
            verified=[position.verified for position in counts.positions],
            conditional_acceptance=[position.conditional for position in counts.positions],
            prefix_survival=[position.survival for position in counts.positions],
            calibration_error=counts.calibration_error,
        )
        for name, counts in Statistics.total(stats).per_drafter.items()
    }


def _geometric_mean(values: Sequence[float]) -> float | None:
    return float(np.exp(np.mean(np.log(values)))) if values else None
