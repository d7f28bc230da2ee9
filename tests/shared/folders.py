"""Folders made once for equal contents: by whichever worker asks first, for both, and for the runs that follow.

They lie in ``.cache/tests`` (or ``DSPARK_TEST_CACHE``). A name is the digest of everything the content follows from, so
nothing ever has to be made anew and an entry can only be right or absent; entries nobody read for a week are removed.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

ROOT = Path(__file__).resolve().parents[2]
CACHE = Path(os.environ.get("DSPARK_TEST_CACHE") or ROOT / ".cache" / "tests")
DAYS_KEPT = 7


def shared_folder(kind: str, digest: str, make: Callable[[Path], None]) -> Path:
    """The folder that ``make`` fills, made unless it is there; ``make`` gets an empty folder that nobody else sees.

    Nobody may write into the folder returned: copy it first.
    """
    folder = CACHE / kind / digest
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.is_dir():
                being_made = folder.with_name(f"{digest}.{os.getpid()}.part")
                shutil.rmtree(being_made, ignore_errors=True)
                being_made.mkdir()
                try:
                    make(being_made)
                    being_made.rename(folder)
                finally:
                    shutil.rmtree(being_made, ignore_errors=True)
    os.utime(folder)
    return folder


def remove_unused(days: float = DAYS_KEPT) -> None:
    """Remove what nobody has asked for in ``days``; run it before a test session, never during one."""
    oldest = time.time() - days * 24 * 3600
    for entry in CACHE.glob("*/*"):
        if entry.stat().st_mtime < oldest:
            if entry.is_dir():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink(missing_ok=True)
