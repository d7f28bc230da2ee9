"""What a pair check finds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from dspark_runtime.errors import DraftMismatch

if TYPE_CHECKING:
    from dspark_export.checkpoints import Checkpoint
    from dspark_export.drafts.formats import DraftCheckpoint

Severity = Literal["error", "warning", "ok"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    ``id`` is stable: ``tokenizer``, ``vocabulary``, ``vocab_map``, ``hidden_size``, ``head_dim``, ``depth``, ``taps``,
    ``block_size``, ``mask_token``, ``rope``, ``positions``, ``embedding``, ``head``. ``asked`` says what has to hold,
    ``found`` what is there, ``fix`` what to do; ``error`` is raised by a build.
    """

    id: str
    severity: Severity
    asked: str
    found: str
    fix: str = ""
    error: type[DraftMismatch] = DraftMismatch

    @property
    def message(self) -> str:
        """One sentence of all three."""
        return f"{self.asked}: {self.found}" + (f"; {self.fix}" if self.fix else "")

    def to_dict(self) -> dict[str, str]:
        """For ``--json``; ``error`` is the name of the type, empty unless it is one."""
        return {
            "id": self.id,
            "severity": self.severity,
            "asked": self.asked,
            "found": self.found,
            "fix": self.fix,
            "error": self.error.__name__ if self.severity == "error" else "",
        }


def passed(name: str, asked: str, found: str) -> Finding:
    """Nothing wrong."""
    return Finding(name, "ok", asked, found)


@dataclass(frozen=True)
class PairReport:
    """All findings about a draft for a target.

    ``fitted``: the draft as a build uses it (taps derived, padding rows left out, own embeddings if allowed); None if
    there is an error.
    """

    target: str
    draft: str
    format: str
    findings: tuple[Finding, ...]
    fitted: DraftCheckpoint | Checkpoint | None = None

    @property
    def errors(self) -> list[Finding]:
        """What forbids the pair."""
        return [finding for finding in self.findings if finding.severity == "error"]

    @property
    def warnings(self) -> list[Finding]:
        """What could not be checked, or costs accepted drafts."""
        return [finding for finding in self.findings if finding.severity == "warning"]

    @property
    def ok(self) -> bool:
        """Whether a build takes the pair."""
        return not self.errors

    def error(self) -> DraftMismatch | None:
        """What a build raises: the type of the one failure, or DraftMismatch for several; None if there is none."""
        if self.ok:
            return None
        kinds = {finding.error for finding in self.errors}
        kind = kinds.pop() if len(kinds) == 1 else DraftMismatch
        found = "; ".join(f"[{finding.id}] {finding.message}" for finding in self.errors)
        return kind(f"{self.draft} cannot draft for {self.target}: {found}")

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "target": self.target,
            "draft": self.draft,
            "format": self.format,
            "ok": self.ok,
            "findings": [finding.to_dict() for finding in self.findings],
        }
