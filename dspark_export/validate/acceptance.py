"""Does a drafter get accepted as it should? A broken one leaves the text correct and only costs speed, so only its
accepted length shows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dspark_export.prompts.texts import PLAIN
from dspark_export.validate.checks import Check
from dspark_export.validate.lossless import Texts
from dspark_export.validate.tolerances import ACCEPTANCE_DROP
from dspark_runtime import Bundle, Generation
from dspark_runtime.decoding.statistics import Statistics

FLOORS = "acceptance"
"""Key of the accepted lengths in ``manifest.validation``."""


def accepted_lengths(bundle: Bundle, texts: Texts) -> dict[str, float]:
    """Tokens of a round, bonus included, of every mode that drafts by fixed rules (not ``auto``, which measures times).

    The texts of trained drafters and self-drafts depend on the schedule too; their lengths are those of drafts of a
    fixed length.
    """
    return {mode: round(_total(generations).accepted_length, 4) for mode, generations in texts.alone.items()}


def _total(generations: Sequence[Generation]) -> Statistics:
    return Statistics.total([generation.stats for generation in generations])


def check_floor(mode: str, texts: Texts, floors: Mapping[str, float]) -> Check:
    """The accepted length of drafts of a fixed length against what an earlier validation found."""
    total = _total(texts.alone[mode])
    measured, floor = total.accepted_length, floors.get(mode)
    least = None if floor is None else 1 + (floor - 1) * (1 - ACCEPTANCE_DROP)
    passed = least is None or measured >= least - 1e-9
    per_drafter = {
        name: {
            "conditional": [round(p.conditional, 4) for p in counts.positions],
            "survival": [round(p.survival, 4) for p in counts.positions],
            "verified": [p.verified for p in counts.positions],
            "calibration_error": counts.calibration_error,
        }
        for name, counts in total.per_drafter.items()
    }
    return Check(
        id=f"plumbing.acceptance.{mode}",
        family="plumbing",
        title=f"Accepted length of {mode}" + ("" if floor is None else " is not below its floor"),
        status="passed" if passed else "failed",
        measured=measured,
        limit=least,
        unit="tokens per round, bonus included; no less than the limit",
        where="" if passed else f"drafter {mode}",
        message=""
        if passed or floor is None
        else f"{mode} gets {measured:.2f} tokens per round; {floor:.2f} were recorded before. The text is right: "
        "something feeds the drafter wrongly, or its weights changed. Look at plumbing.reference and numerics.",
        data={"rounds": total.rounds, "floor": floor, "drafters": per_drafter},
    )


def fixed_length(bundle: Bundle, mode: str) -> int | None:
    """Drafts of a round whose acceptance is compared between builds; None for modes that are not compared."""
    if mode == PLAIN or mode == "auto" or "+" in mode:
        return None
    entry = next((e for e in bundle.manifest.drafters if e.name == mode), None)
    if entry is not None and entry.block is not None:
        return min(entry.block.drafts, 31)
    return 4
