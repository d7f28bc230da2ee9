"""What a validation found: one :class:`Check` per question, and the :class:`Report` that holds them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from dspark_runtime.bundle.records import Record

Family = Literal["numerics", "losslessness", "plumbing", "robustness", "speed"]
Status = Literal["passed", "failed", "skipped"]
FAMILIES: tuple[Family, ...] = ("numerics", "losslessness", "plumbing", "robustness", "speed")


class Check(Record, allow_inf_nan=True):
    """One question and its answer.

    ``id`` names it for scripts, ``title`` for people. ``measured`` and ``limit`` are in ``unit``; None where there is
    nothing to measure. ``where`` names the place of a failure in the model's or the runtime's own terms, ``message``
    says what is wrong and what to do. ``data`` is what plots are drawn from.
    """

    id: str
    family: Family
    title: str
    status: Status
    measured: float | None = None
    limit: float | None = None
    unit: str = ""
    where: str = ""
    message: str = ""
    seconds: float = 0.0
    data: dict[str, Any] = Field(default_factory=dict)


class Report(Record, allow_inf_nan=True):
    """All checks of one run. ``passed``: none failed. ``bundle_digest`` identifies graphs, weights and tokenizer."""

    schema_version: Literal[1] = 1
    created_by: str
    created_at: str
    bundle: str
    bundle_digest: str
    model: str
    precision: str
    exact: bool
    level: Literal["quick", "full"]
    against: str
    machine: str
    prompts: int
    seconds: float
    passed: bool
    acceptance: dict[str, float]
    checks: tuple[Check, ...]

    def failures(self) -> list[Check]:
        """The checks that failed."""
        return [check for check in self.checks if check.status == "failed"]
