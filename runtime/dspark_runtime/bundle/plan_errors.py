"""Says what is wrong with an engine's plan that is not the file the manifest describes."""

from __future__ import annotations

from collections.abc import Mapping

from dspark_runtime.bundle.manifest import FileEntry, Manifest
from dspark_runtime.errors import PlanAltered, PlanDamaged, PlanEmpty, PlanExtended, PlanSwapped, PlanTruncated


def plan_error(file: str, entry: FileEntry, size: int, digest: str, manifest: Manifest) -> PlanDamaged:
    """The error for a plan of ``size`` bytes and ``digest`` where the manifest has ``entry``."""
    todo = "copy the bundle again, or compile it again"
    others = _plans(manifest)
    if size == 0:
        return PlanEmpty(f"the plan {file} has no bytes, {entry.size} are expected; {todo}")
    if digest in others and others[digest] != file:
        return PlanSwapped(f"the file {file} holds the plan {others[digest]}; {todo}")
    if size < entry.size:
        return PlanTruncated(f"the plan {file} has {size} of {entry.size} bytes; {todo}")
    if size > entry.size:
        return PlanExtended(f"the plan {file} has {size} bytes, {size - entry.size} more than it should; {todo}")
    return PlanAltered(f"the plan {file} was altered: its SHA-256 is not the manifest's; {todo}")


def _plans(manifest: Manifest) -> Mapping[str, str]:
    return {manifest.files[engine.file].sha256: engine.file for engine in manifest.engines}
