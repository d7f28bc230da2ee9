"""Build backend of dspark-export: hatchling, which is told the version of dspark-runtime and where to get it.

Both distributions have the version in ``runtime/pyproject.toml``. What dspark-export requires depends on what is built:

| built | from | requirement |
|---|---|---|
| a wheel, such as for ``pip install .`` | a checkout | the runtime of the same checkout, as a file URL |
| an editable wheel, ``pip install -e . -e ./runtime`` | a checkout | ``dspark-runtime==VERSION``: pip wants no URL |
| an sdist | a checkout | ``dspark-runtime==VERSION`` |
| a wheel | an sdist | what the sdist says |

A package index refuses the first of these: wheels to publish are made from the sdist, as ``python -m build`` does.
"""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Any

from hatchling import build as hatchling
from hatchling.build import (  # the rest of the interface that pip and build call (PEP 517, PEP 660)
    build_editable,
    build_sdist,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    get_requires_for_build_wheel,
)
from hatchling.metadata.plugin.interface import MetadataHookInterface

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
]

_FROM_CHECKOUT = "DSPARK_RUNTIME_FROM_CHECKOUT"  # hatchling loads this file again for the hook, which sees no variable


def build_wheel(
    wheel_directory: str, config_settings: dict[str, Any] | None = None, metadata_directory: str | None = None
) -> str:
    """A wheel that, in a checkout, requires the runtime beside it."""
    os.environ[_FROM_CHECKOUT] = "1"
    try:
        return str(hatchling.build_wheel(wheel_directory, config_settings, metadata_directory))
    finally:
        del os.environ[_FROM_CHECKOUT]


class RuntimeRequirement(MetadataHookInterface):
    """Gives the version, and the dependencies of ``tool.hatch.metadata.hooks.custom`` with the runtime in front."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Fill in what ``project.dynamic`` leaves out; an sdist has it already."""
        runtime = Path(self.root) / "runtime"
        if not (runtime / "pyproject.toml").is_file():
            return
        version = tomllib.loads((runtime / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
        source = f" @ {runtime.as_uri()}" if _FROM_CHECKOUT in os.environ else f"=={version}"
        metadata["version"] = version
        metadata["dependencies"] = [f"dspark-runtime{source}", *self.config["dependencies"]]
