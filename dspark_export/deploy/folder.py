"""A new folder that is either complete or absent."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dspark_runtime.errors import DeploymentError


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Gives a hidden sibling of ``out`` to write into, which takes its place when the block ends without an error.

    Raises:
        DeploymentError: ``out`` is taken, or cannot be written.
    """
    out = Path(os.path.abspath(out))
    partial = out.parent / f".{out.name}.partial-{os.getpid()}"
    try:
        _check_free(out)
        out.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        yield partial
        _check_free(out)
        os.rename(partial, out)
    except OSError as error:
        raise DeploymentError(f"cannot write {out}: {error.strerror or error}; choose another folder") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_free(out: Path) -> None:
    if os.path.lexists(out) and (out.is_symlink() or not out.is_dir() or any(out.iterdir())):
        raise DeploymentError(f"{out} exists already, and nothing is ever overwritten; choose another folder")
