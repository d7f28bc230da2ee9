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

Times are those of the batch the sequence ran in: sequences that run together share a pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class DrafterCounts:
    """Tokens of one drafter that were verified (``drafted``), and how many of them were accepted."""

    drafted: int = 0
    accepted: int = 0


@dataclass
class Seconds:
    """Wall time by phase."""

    prefill: float = 0.0
    draft: float = 0.0
    verify: float = 0.0
    host: float = 0.0

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
        return asdict(self) | {name: getattr(self, name) for name in derived}

    @classmethod
    def total(cls, parts: Sequence[Statistics], together: bool = False) -> Statistics:
        """Sum of several; ``together``: they ran in one batch, so that the longest time of each phase is the time."""
        result = cls(sequences=sum(part.sequences for part in parts))
        for part in parts:
            for name in ("rounds", "drafted", "verified", "accepted", "emitted"):
                setattr(result, name, getattr(result, name) + getattr(part, name))
            for drafter, counts in part.per_drafter.items():
                mine = result.per_drafter.setdefault(drafter, DrafterCounts())
                mine.drafted += counts.drafted
                mine.accepted += counts.accepted
            for name in ("prefill", "draft", "verify", "host"):
                mine_s, theirs = getattr(result.seconds, name), getattr(part.seconds, name)
                setattr(result.seconds, name, max(mine_s, theirs) if together else mine_s + theirs)
        return result
