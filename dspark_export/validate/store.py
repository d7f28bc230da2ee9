"""Puts the reports of a validation into the bundle, and its verdict into the manifest."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import filelock

from dspark_export.validate.acceptance import FLOORS
from dspark_export.validate.checks import Report
from dspark_runtime.bundle.files import BundleFiles
from dspark_runtime.bundle.manifest import MANIFEST, FileEntry, Manifest
from dspark_runtime.errors import BundleBusy, BundleNotWritten

FOLDER = "validation"


def verdict(report: Report, files: dict[str, str]) -> dict[str, Any]:
    """What ``manifest.validation`` keeps; ``files``: paths of the reports by kind."""
    return {
        "passed": report.passed,
        "level": report.level,
        "against": report.against,
        "created_at": report.created_at,
        "created_by": report.created_by,
        "bundle_digest": report.bundle_digest,
        "checks": len(report.checks),
        "failed": [check.id for check in report.failures()],
        "acceptance": report.acceptance,
        **files,
    }


def store(files: BundleFiles, report: Report, page: str) -> dict[str, Path]:
    """Write report and page below ``validation/``, replacing earlier ones; returns their places by kind.

    New files have new names, then the manifest is replaced at once, then old ones go: a bundle that is read in between,
    or left in the middle, is whole.

    Raises:
        BundleNotWritten: the bundle cannot be written to.
        BundleBusy: it is being written.
    """
    root, contents = files.root, {"json": report.model_dump_json(indent=1) + "\n", "html": page}
    lock = filelock.FileLock(root.parent / f".{root.name}.lock", timeout=0)
    try:
        with lock:
            current = Manifest.parse((root / MANIFEST).read_bytes())
            (root / FOLDER).mkdir(exist_ok=True)
            entries, named = {}, {}
            for kind, text in contents.items():
                data = text.encode()
                digest = hashlib.sha256(data).hexdigest()
                relative = f"{FOLDER}/report-{digest[:12]}.{kind}"
                _write(root / relative, data)
                entries[relative], named[kind] = FileEntry(sha256=digest, size=len(data)), relative
            old = [name for name in current.files if name.startswith(f"{FOLDER}/") and name not in entries]
            kept = {name: entry for name, entry in current.files.items() if name not in old}
            update = {
                "files": {**kept, **entries},
                "validation": {**verdict(report, named), FLOORS: _floors(report, current.validation)},
            }
            manifest = current.model_copy(update=update)
            _write(root / MANIFEST, (manifest.model_dump_json(indent=1) + "\n").encode())
            for name in old:
                (root / name).unlink(missing_ok=True)
    except filelock.Timeout as error:
        raise BundleBusy(
            f"{root} is being written by another process; validate it again when that has ended"
        ) from error
    except OSError as error:
        raise BundleNotWritten(
            f"cannot write the report into {root}: {error.strerror or error}; name another folder with --out"
        ) from error
    finally:
        (root.parent / f".{root.name}.lock").unlink(missing_ok=True)
    return {kind: root / relative for kind, relative in named.items()}


def _floors(report: Report, before: dict[str, Any]) -> dict[str, float]:
    """Accepted lengths to be reached from now on; a failed validation does not lower them."""
    old = before.get(FLOORS)
    if report.passed or before.get("level") != report.level or not isinstance(old, dict):
        return report.acceptance
    return {mode: max(length, float(old.get(mode, 0.0))) for mode, length in report.acceptance.items()}


def store_outside(folder: Path, report: Report, page: str) -> dict[str, Path]:
    """Write ``report.json`` and ``report.html`` into ``folder``; the bundle is not changed. Raises BundleNotWritten."""
    places = {"json": folder / "report.json", "html": folder / "report.html"}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(places["json"], (report.model_dump_json(indent=1) + "\n").encode())
        _write(places["html"], page.encode())
    except OSError as error:
        raise BundleNotWritten(f"cannot write the report into {folder}: {error.strerror or error}") from error
    return places


def _write(path: Path, data: bytes) -> None:
    """The file is whole or what it was."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
