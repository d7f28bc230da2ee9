"""``--plugins``: which form of the nodes of the domain ``dspark`` is available here."""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path

from dspark_export.engines.aot_plugins import compile_ptx
from dspark_export.engines.options import CompileOptions
from dspark_export.engines.plugin_forms import INLINED, Plugins
from dspark_runtime.backends.plugin_files import FOLDER_VARIABLE, LIBRARY, PTX, how_to_build, plugin_file, plugin_folder
from dspark_runtime.backends.plugin_launches import MAX_BATCH, MAX_ROWS, MAX_VOCAB
from dspark_runtime.errors import UsageError

SORT_LIMIT = 3840
"""Numbers TensorRT sorts at most: an inlined ``VerifyTree`` compiles for vocabularies up to this."""

LIMITS = {"batch": MAX_BATCH, "rows": MAX_ROWS, "vocab": MAX_VOCAB}
"""Largest sizes ``VerifyTree`` and ``VerifyChain`` take: kMaxBatch, kMaxVerifyRows, kMaxVocab of the kernels."""

_SOURCES = Path(__file__).resolve().parents[2] / "plugins"


def find_plugins(options: CompileOptions) -> Plugins | None:
    """What ``options.plugins`` asks for; None where ``auto`` finds nothing.

    Raises:
        UsageError: the requested form is not available; the text says what is missing.
        EngineBuildError: the kernels do not compile.
    """
    if options.plugins == "none":
        return INLINED
    library = plugin_file(LIBRARY)
    if options.plugins == "library":
        if library is None:
            raise UsageError(f"--plugins library: {plugin_folder()} has no {LIBRARY}; {how_to_build(LIBRARY)}")
        return Plugins("library", library)
    if options.plugins == "aot":
        found = _embedded()
        if found is None:
            raise UsageError(
                f"--plugins aot: {plugin_folder()} has no {PTX} and there is no nvcc to make it; install CUDA's "
                f"compiler, or set {FOLDER_VARIABLE} to a folder with it"
            )
        return found
    if options.flavour != "tensorrt":
        return None  # a library is for one flavour, and which one does not show
    return Plugins("library", library) if library is not None else _embedded()


def _embedded() -> Plugins | None:
    if (file := plugin_file(PTX)) is not None:
        return Plugins("aot", ptx=file.read_text(encoding="utf-8"))
    nvcc = shutil.which("nvcc")
    if nvcc is None or not (_SOURCES / "kernels" / "walk.cu").is_file():
        return None
    return Plugins("aot", ptx=_compiled(nvcc))


@cache
def _compiled(nvcc: str) -> str:
    """Some 20 seconds of work, which a build asks for before it begins and once more when it compiles."""
    return compile_ptx(_SOURCES, nvcc)


def require_limits(options: CompileOptions, vocab: int) -> None:
    """Raise UsageError if the plugins do not take passes as large as ``options.ranges`` asks for."""
    asked = {"batch": options.ranges.batch, "rows": options.ranges.verify_rows, "vocab": vocab}
    names = {"batch": "--batch", "rows": "--verify-rows", "vocab": "a vocabulary of"}
    for dim, limit in LIMITS.items():
        if asked[dim] > limit:
            raise UsageError(
                f"{names[dim]} {asked[dim]} is more than the {limit} that the plugin of graph verify takes; lower it, "
                "or leave verify out with --graph"
            )
