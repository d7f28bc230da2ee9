"""Files of a checkpoint folder: which ones may be read, and their digests."""

from __future__ import annotations

import stat
from pathlib import Path

from dspark_runtime.errors import CheckpointError


def allowed_root(folder: Path) -> Path:
    """Where symlinks of ``folder`` may lead: the folder, or the whole repository cache for a hub snapshot.

    The hub cache keeps contents in ``blobs/`` and makes ``snapshots/<commit>/`` a folder of links to them.
    """
    folder = folder.resolve()
    if folder.parent.name == "snapshots" and (folder.parent.parent / "blobs").is_dir():
        return folder.parent.parent
    return folder


def checked_file(folder: Path, name: str, error: type[CheckpointError]) -> Path:
    """``folder/name`` if it is a regular file inside the folder, read without side effects; raises ``error`` otherwise.

    Refused are absolute names, ``..``, symlinks that leave the folder, hard links, pipes, devices and folders.
    """
    if not name or "\0" in name or "\\" in name or name.startswith("/") or ".." in name.split("/"):
        raise error(f"{folder} refers to a file {name!r} outside itself; get the checkpoint from its source again")
    path = folder / name
    try:
        real = path.resolve(strict=True)
        info = real.stat()
    except (OSError, RuntimeError) as cause:
        raise error(f"{name} of {folder} is missing or unreadable ({cause}); get the checkpoint again") from cause
    if not real.is_relative_to(allowed_root(folder)):
        raise error(f"{name} of {folder} is a symlink to {real}, outside the folder; put the file itself there")
    if not stat.S_ISREG(info.st_mode):
        kind = "a folder" if stat.S_ISDIR(info.st_mode) else "a pipe or device"
        raise error(f"{name} of {folder} is {kind}, not a file; get the checkpoint again")
    if info.st_nlink > 1:
        raise error(
            f"{name} of {folder} is a hard link to a file that also exists elsewhere; copy the checkpoint without links"
        )
    return path
