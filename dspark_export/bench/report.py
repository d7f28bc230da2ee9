"""The result of a benchmark, as a table for people and as data for programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from dspark_export.bench.bandwidth import Bandwidth
from dspark_export.bench.runner import ALL_SETS, BenchResult, Divergence, ModeSummary
from dspark_export.prompts.texts import PLAIN
from dspark_runtime import Bundle

if TYPE_CHECKING:
    from rich.console import Console

_SHOWN_DIVERGENCES = 8
_SHOWN_DEPTHS = 8
_FIGURES = ("tokens/s", "x plain", "worst", "accepted\nlength", "draft", "verify", "host", "ms a\nround", "equal\ntext")


@dataclass(frozen=True)
class Conditions:
    """What a run was made with. ``threads`` are those really used; ``weight_bytes_per_token`` one step reads."""

    bundle: str
    model: str
    precision: str
    exact: bool
    row_noise: float | None
    cpu: str
    threads: int
    max_new_tokens: int
    repeats: int
    weight_bytes_per_token: int
    bandwidth: Bandwidth

    @property
    def limit(self) -> float:
        """Tokens per second that plain decoding cannot exceed while it reads every weight once for each."""
        return self.bandwidth.read / self.weight_bytes_per_token


def to_json(conditions: Conditions, result: BenchResult) -> dict[str, Any]:
    """Everything measured. Speeds are tokens per second, bandwidths bytes per second, times milliseconds of a round."""
    plain = next(s for s in result.summaries if s.set == ALL_SETS and s.mode == PLAIN)
    reached = plain.tokens_per_second
    return asdict(conditions) | {
        "plain_limit_tokens_per_second": conditions.limit,
        "plain_share_of_limit": None if reached is None else reached / conditions.limit,
        "tokens_equal": not result.divergences,
        "summaries": [asdict(summary) for summary in result.summaries],
        "divergences": [asdict(divergence) for divergence in result.divergences],
    }


def heading(conditions: Conditions) -> str:
    """One line that names model, precision and machine."""
    precision = f"{conditions.precision}, exact" if conditions.exact else conditions.precision
    threads = "1 thread" if conditions.threads == 1 else f"{conditions.threads} threads"
    return f"{conditions.model}, {precision}, {threads} of {conditions.cpu}"


def print_report(console: Console, conditions: Conditions, result: BenchResult, bundle: Bundle) -> None:
    """The table, the limit set by memory, and the first divergences."""
    console.print(heading(conditions), style="bold", highlight=False, markup=False)
    console.print(_table(shown_summaries(result)))
    if any(s.drafters for s in over_all_sets(result)):
        console.print()
        console.print(_drafters_table(over_all_sets(result)))
    for line in _notes(conditions, result):
        console.print(line, highlight=False, markup=False)
    if result.divergences:
        _print_divergences(console, conditions, result.divergences, bundle)


def shown_summaries(result: BenchResult) -> list[ModeSummary]:
    """All summaries, without those over all sets where there is but one set."""
    one_set = len({s.set for s in result.summaries}) == 2
    return [s for s in result.summaries if not (one_set and s.set == ALL_SETS)]


def over_all_sets(result: BenchResult) -> list[ModeSummary]:
    """The summaries over all sets, one of each mode."""
    return [s for s in result.summaries if s.set == ALL_SETS]


def _drafters_table(summaries: Sequence[ModeSummary]) -> Table:
    """Acceptance by depth, all sets together."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("mode", "drafter"):
        table.add_column(column, no_wrap=True)
    for column in ("drafts\naccepted", "calibration\nerror"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("accepted at depth 1, 2, ...\nif all before were / with all before", no_wrap=True)
    for s in summaries:
        for place, (name, drafter) in enumerate(s.drafters.items()):
            depths = list(zip(drafter.conditional_acceptance, drafter.prefix_survival, strict=True))
            shown = "  ".join(f"{given:.2f}/{whole:.2f}" for given, whole in depths[:_SHOWN_DEPTHS])
            error = drafter.calibration_error
            table.add_row(
                "" if place else s.mode,
                name,
                f"{drafter.accepted}/{drafter.drafted}",
                "-" if error is None else f"{error:.1%}",
                shown + ("  ..." if len(depths) > _SHOWN_DEPTHS else ""),
            )
    return table


def _table(summaries: Sequence[ModeSummary]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("set", "mode"):
        table.add_column(column, no_wrap=True)
    for column in _FIGURES:
        table.add_column(column, justify="right", no_wrap=True)
    previous = None
    for s in summaries:
        if previous not in (None, s.set):
            table.add_row()
        table.add_row(
            escape(s.set) if s.set != previous else "",
            "plain" if s.mode == PLAIN else s.mode,
            _number(s.tokens_per_second, 1),
            _number(s.ratio, 2),
            _number(s.worst_ratio, 2),
            f"{s.accepted_length:.2f}",
            *(f"{share:.1%}" for share in (s.draft_share, s.verify_share, s.host_share)),
            f"{s.draft_ms + s.verify_ms + s.host_ms:.2f}",
            f"{s.equal}/{s.prompts}",
        )
        previous = s.set
    return table


def _notes(conditions: Conditions, result: BenchResult) -> list[str]:
    plain = next(s for s in result.summaries if s.set == ALL_SETS and s.mode == PLAIN)
    bandwidth = conditions.bandwidth
    share = "" if plain.tokens_per_second is None else f"; it reached {plain.tokens_per_second / conditions.limit:.0%}"
    return [
        "",
        f"tokens/s: decoding alone, geometric mean over prompts of the median of {conditions.repeats}. Prefill, which "
        f"is not in it, ran at {_number(plain.prefill_tokens_per_second, 0)} tokens/s.",
        "x plain: mean over prompts of each prompt's ratio; worst: the lowest. accepted length: tokens of a round.",
        f"memory: read {bandwidth.read / 1e9:.1f} GB/s, triad {bandwidth.triad / 1e9:.1f} GB/s. Plain decoding reads "
        f"{conditions.weight_bytes_per_token / 1e6:.0f} MB of weights per token, so its limit is "
        f"{conditions.limit:.0f} tokens/s{share}.",
    ]


def _print_divergences(
    console: Console, conditions: Conditions, divergences: Sequence[Divergence], bundle: Bundle
) -> None:
    noise = conditions.row_noise
    known = "was not measured" if noise is None else f"is {noise:.2g}"
    console.print("\ntexts that left the plain one:", style="bold")
    for d in divergences[:_SHOWN_DIVERGENCES]:
        plain, other = (
            repr(bundle.codec.decode([t])) if t is not None else "the end" for t in (d.plain_token, d.token)
        )
        where = f"{d.mode}, {d.set} prompt {d.prompt + 1}, token {d.position + 1}: plain {plain}, here {other}"
        console.print(f"  {where}", highlight=False, markup=False)
    if len(divergences) > _SHOWN_DIVERGENCES:
        console.print(f"  and {len(divergences) - _SHOWN_DIVERGENCES} more, see --json")
    console.print(
        f"The row noise of this bundle (how far logits move with the rows of a pass) {known}: below that margin two "
        "tokens are a near tie, and either may come. benchmarks/losslessness.py measures the margins; --exact rules "
        "such ties out.",
        highlight=False,
    )


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
