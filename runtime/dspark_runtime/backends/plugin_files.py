"""Where the compiled plugins are, and how to get them."""

from __future__ import annotations

import os
from pathlib import Path

LIBRARY, FATBIN, PTX = "libdspark_plugins.so", "dspark.fatbin", "dspark_walk.ptx"
FOLDER_VARIABLE = "DSPARK_PLUGINS"
_BUILD = Path(__file__).resolve().parents[2] / "plugins" / "build"


def plugin_folder() -> Path:
    """Where compiled plugins are looked for: the variable ``DSPARK_PLUGINS``, else ``plugins/build`` of a checkout."""
    given = os.environ.get(FOLDER_VARIABLE)
    return Path(given) if given else _BUILD


def plugin_file(name: str) -> Path | None:
    """The file ``name`` of :func:`plugin_folder`; None if it is not there."""
    found = plugin_folder() / name
    return found if found.is_file() else None


def how_to_build(name: str) -> str:
    """What a user does who lacks the file ``name``."""
    return (
        f"build the folder plugins/ of the sources with CMake, which makes {name}, and set {FOLDER_VARIABLE} to the "
        "folder with it"
    )
