"""Registers the plugin library with TensorRT, in the version an engine was compiled with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dspark_runtime.backends.plugin_files import LIBRARY, how_to_build
from dspark_runtime.bundle.engine_names import NAMESPACE
from dspark_runtime.errors import EnginePluginMismatch, EngineRefused


def load_plugins(trt: Any, library: Path | None, plugins: Mapping[str, str]) -> None:
    """Load ``library`` into TensorRT's registry unless ``plugins``, versions by name, are there already.

    Args:
        trt: TensorRT's module.
        library: the shared library; None: it was not found.
        plugins: version of every plugin that is needed.

    Raises:
        EngineRefused: there is no library, or TensorRT cannot load it.
        EnginePluginMismatch: it has no plugin of that name and version.
    """
    registry = trt.get_plugin_registry()
    if not _missing(registry, plugins):
        return
    if library is None:
        raise EngineRefused(f"there is no {LIBRARY} with {_listed(plugins)}; {how_to_build(LIBRARY)}")
    if registry.load_library(str(library.resolve())) is None:
        raise EngineRefused(
            f"{library} cannot be loaded as a plugin library of TensorRT {trt.__version__}; build it with the "
            "headers of that version"
        )
    if missing := _missing(registry, plugins):
        raise EnginePluginMismatch(
            f"{library} has no plugin {_listed(missing)}; build the library of the version the engine was compiled "
            "with, or compile the bundle again"
        )


def _missing(registry: Any, plugins: Mapping[str, str]) -> dict[str, str]:
    return {n: version for n, version in plugins.items() if registry.get_creator(n, version, NAMESPACE) is None}


def _listed(plugins: Mapping[str, str]) -> str:
    return ", ".join(f"{NAMESPACE}::{name} version {version}" for name, version in plugins.items())
