"""Checks whether a draft fits a model before anything is exported; every failure says how to fix it."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from dspark_export.drafts.formats.description import EMBEDDING, HEAD
from dspark_export.drafts.formats.draft import DraftCheckpoint
from dspark_export.drafts.pair_check.embeddings import check_copies
from dspark_export.drafts.pair_check.fit import fit
from dspark_export.drafts.pair_check.geometry import check_block, check_positions, check_rope, check_taps, check_width
from dspark_export.drafts.pair_check.report import Finding, PairReport
from dspark_export.drafts.pair_check.tokenizers import check_tokenizers
from dspark_export.drafts.pair_check.vocabulary import check_map, check_mask, check_sizes, token_count

if TYPE_CHECKING:
    from dspark_export.checkpoints import Checkpoint

__all__ = ["Finding", "PairReport", "PairWarning", "check_pair", "require_pair"]


class PairWarning(UserWarning):
    """Something about a draft and its model that could not be checked, or costs accepted drafts."""


def check_pair(
    target: Checkpoint,
    draft: DraftCheckpoint | Checkpoint,
    *,
    allow_own_embeddings: bool = False,
    drafts: int | None = None,
) -> PairReport:
    """All findings about ``draft`` for ``target``; nothing is raised for a bad pair.

    ``allow_own_embeddings``: copies that differ from the target's tables are used instead of them. ``drafts``: tokens
    per round that will be asked for.
    """
    findings = [*check_tokenizers(target, draft), *check_sizes(target, draft)]
    if not isinstance(draft, DraftCheckpoint):
        findings += check_positions(target, draft)
        good = not any(finding.severity == "error" for finding in findings)
        return PairReport(target.id, draft.id, "draft model", tuple(findings), draft if good else None)
    findings += check_map(target, draft) + check_width(target, draft) + check_taps(target, draft)
    findings += check_block(draft, drafts) + check_mask(target, draft)
    findings += check_rope(target, draft) + check_positions(target, draft)
    copies = check_copies(target, draft, allow_own_embeddings, token_count(target))
    findings += copies
    if any(finding.severity == "error" for finding in findings):
        return PairReport(target.id, draft.id, draft.format, tuple(findings))
    names = {"embedding": EMBEDDING, "head": HEAD}
    own = {names[finding.id] for finding in copies if finding.severity == "warning"}
    return PairReport(target.id, draft.id, draft.format, tuple(findings), fit(target, draft, own))


def require_pair(
    target: Checkpoint, draft: DraftCheckpoint | Checkpoint, *, allow_own_embeddings: bool = False
) -> DraftCheckpoint | Checkpoint:
    """The draft as a build of ``target`` uses it; warns with PairWarning, raises DraftMismatch or a type of it."""
    report = check_pair(target, draft, allow_own_embeddings=allow_own_embeddings)
    for finding in report.warnings:
        warnings.warn(f"{report.draft} for {report.target}: {finding.message}", PairWarning, stacklevel=2)
    if error := report.error():
        raise error
    assert report.fitted is not None
    return report.fitted
