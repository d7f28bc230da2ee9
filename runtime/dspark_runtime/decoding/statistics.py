"""What a generation counted and how long it took.

======================  =============================================================================================
``rounds``              passes of the target after prefill in which this sequence took part
``drafted``             tokens the drafters proposed
``verified``            proposed tokens that went through the target (the schedule may cut a proposal)
``accepted``            verified tokens that the target confirmed and that were emitted
``emitted``             tokens given to the caller, the one from prefill included
``accepted_length``     tokens a round emitted on average: accepted ones plus the correction or bonus token
``seconds.prefill``     prompt passes; ``draft``: proposing; ``verify``: target passes; ``host``: all other time
======================  =============================================================================================

Times are those of the steps the sequence took part in, whole: sequences that run together share a pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

CALIBRATION_BINS = 20


@dataclass
class PositionCounts:
    """One depth of a drafter's main chain (its most likely tokens), over the rounds that verified it.

    ``verified``: rounds that verified a draft there. ``reached``: those in which all drafts before it were accepted.
    ``accepted``: those in which it was accepted too.
    """

    verified: int = 0
    reached: int = 0
    accepted: int = 0

    @property
    def conditional(self) -> float:
        """Acceptance given that all drafts before it were accepted; 0 where none was reached."""
        return self.accepted / self.reached if self.reached else 0.0

    @property
    def survival(self) -> float:
        """Share of rounds in which everything up to here was accepted; 0 where nothing was verified."""
        return self.accepted / self.verified if self.verified else 0.0


@dataclass
class DrafterCounts:
    """Tokens of one drafter that were verified (``drafted``), and how many of them were accepted.

    ``positions``: the same by depth. ``calibration``: for drafters that estimate their acceptance, 20 bins over the
    estimate that everything up to a depth is accepted: [count, sum of estimates, times it came true].
    """

    drafted: int = 0
    accepted: int = 0
    positions: list[PositionCounts] = field(default_factory=list)
    calibration: list[list[float]] = field(default_factory=list)

    def count_chain(self, verified: int, accepted: int, confidences: Sequence[float] = ()) -> None:
        """Count one round whose main chain had ``verified`` drafts, the first ``accepted`` of which were right."""
        while len(self.positions) < verified:
            self.positions.append(PositionCounts())
        for depth in range(verified):
            counts = self.positions[depth]
            counts.verified += 1
            if depth <= accepted:
                counts.reached += 1
                counts.accepted += depth < accepted
        if not confidences:
            return
        if not self.calibration:
            self.calibration = [[0.0, 0.0, 0.0] for _ in range(CALIBRATION_BINS)]
        reach = 1.0
        for depth, confidence in enumerate(confidences[:verified]):
            reach *= confidence
            cell = self.calibration[min(int(reach * CALIBRATION_BINS), CALIBRATION_BINS - 1)]
            cell[0] += 1
            cell[1] += reach
            cell[2] += depth < accepted

    @property
    def calibration_error(self) -> float | None:
        """Expected calibration error, in [0, 1]: mean distance of estimate and truth over bins; None without any."""
        total = sum(cell[0] for cell in self.calibration)
        return sum(abs(cell[1] - cell[2]) for cell in self.calibration) / total if total else None

    def add(self, other: DrafterCounts) -> None:
        """Add the counts of ``other``."""
        self.drafted += other.drafted
        self.accepted += other.accepted
        while len(self.positions) < len(other.positions):
            self.positions.append(PositionCounts())
        for mine, theirs in zip(self.positions, other.positions, strict=False):
            mine.verified += theirs.verified
            mine.reached += theirs.reached
            mine.accepted += theirs.accepted
        if other.calibration and not self.calibration:
            self.calibration = [[0.0, 0.0, 0.0] for _ in range(CALIBRATION_BINS)]
        for cell, add in zip(self.calibration, other.calibration, strict=False):
            for i in range(3):
                cell[i] += add[i]


@dataclass
class Seconds:
    """Wall time by phase."""

    prefill: float = 0.0
    draft: float = 0.0
    verify: float = 0.0
    host: float = 0.0

    def add(self, draft: float, verify: float, host: float) -> None:
        """Add the times of one round."""
        self.draft += draft
        self.verify += verify
        self.host += host

    @property
    def decode(self) -> float:
        """Everything after prefill."""
        return self.draft + self.verify + self.host


@dataclass
class Statistics:
    """Counters and times of one generated sequence, or of several (:meth:`total`); see the module's table."""

    rounds: int = 0
    drafted: int = 0
    verified: int = 0
    accepted: int = 0
    emitted: int = 0
    sequences: int = 1
    per_drafter: dict[str, DrafterCounts] = field(default_factory=dict)
    seconds: Seconds = field(default_factory=Seconds)

    @property
    def accepted_length(self) -> float:
        """Mean tokens of a round, the correction or bonus token included; 0 before the first round."""
        return (self.emitted - self.sequences) / self.rounds if self.rounds else 0.0

    @property
    def acceptance_rate(self) -> float:
        """Accepted share of the verified tokens; 0 where nothing was verified."""
        return self.accepted / self.verified if self.verified else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Decoded tokens (without the one from prefill) over decode time; 0 where there was no round."""
        return (self.emitted - self.sequences) / self.seconds.decode if self.seconds.decode else 0.0

    @property
    def host_share(self) -> float:
        """Share of decode time outside drafting and target passes."""
        return self.seconds.host / self.seconds.decode if self.seconds.decode else 0.0

    def to_dict(self) -> dict[str, Any]:
        """All counters, times and derived figures, ready for JSON."""
        derived = ("accepted_length", "acceptance_rate", "tokens_per_second", "host_share")
        drafters = {
            name: asdict(counts)
            | {
                "conditional_acceptance": [round(p.conditional, 4) for p in counts.positions],
                "prefix_survival": [round(p.survival, 4) for p in counts.positions],
                "calibration_error": counts.calibration_error,
            }
            for name, counts in self.per_drafter.items()
        }
        return asdict(self) | {name: getattr(self, name) for name in derived} | {"per_drafter": drafters}

    @classmethod
    def total(cls, parts: Sequence[Statistics]) -> Statistics:
        """Sum of several. Times are added too: of sequences that shared a pass, each counts it whole."""
        result = cls(sequences=sum(part.sequences for part in parts))
        for part in parts:
            for name in ("rounds", "drafted", "verified", "accepted", "emitted"):
                setattr(result, name, getattr(result, name) + getattr(part, name))
            for drafter, counts in part.per_drafter.items():
                result.per_drafter.setdefault(drafter, DrafterCounts()).add(counts)
            for name in ("prefill", "draft", "verify", "host"):
                setattr(result.seconds, name, getattr(result.seconds, name) + getattr(part.seconds, name))
        return result
