"""The sequence kernels in ONNX Runtime: finds their library and says what it can do on this machine.

``docs/sequence-kernels.md`` describes the operators. The library is looked for in this order: the file that
``DSPARK_CPU_LIBRARY`` names (``none`` for no library at all), the one in this package, and the one that
:mod:`dspark_runtime.backends.build_kernels` made. Without it, bundles run on ONNX Runtime's own operators.
"""

from __future__ import annotations

import ctypes
import functools
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

from dspark_runtime.backends.build_kernels import COMMAND, LIBRARY, cached_library, sources
from dspark_runtime.errors import BackendError

LIBRARY_VARIABLE, SET_VARIABLE = "DSPARK_CPU_LIBRARY", "DSPARK_CPU"
NO_LIBRARY = "none"
DOMAIN = "dspark"
_PACKAGED = Path(__file__).resolve().parents[1] / "lib" / LIBRARY
HOW_TO_GET = f"with a C++ compiler, or after `pip install ziglang`, run `{COMMAND}`"
LOSS = "passes take about twice as long, several rows cost more, and exact text needs more of them"


class SlowerWithoutKernels(UserWarning):
    """A bundle runs on ONNX Runtime's operators although it has graphs for the sequence kernels."""


@dataclass(frozen=True)
class KernelLibrary:
    """A library that loads here. ``instruction_set`` is the one in use, ``sets`` all that run here, best first."""

    path: Path
    instruction_set: str
    sets: tuple[str, ...]
    operators: frozenset[str]


def library_path() -> Path | None:
    """The file to load; None if there is none."""
    given = os.environ.get(LIBRARY_VARIABLE)
    if given:
        return None if given == NO_LIBRARY else Path(given)
    if _PACKAGED.is_file():
        return _PACKAGED
    folder = sources()
    made = None if folder is None else cached_library(folder)
    return made if made is not None and made.is_file() else None


def kernel_library() -> KernelLibrary | None:
    """The library in use; None if there is none.

    Raises:
        BackendError: it cannot be loaded, or ``DSPARK_CPU`` names an instruction set that this machine lacks.
    """
    path = library_path()
    return None if path is None else _load(path, os.environ.get(SET_VARIABLE, ""))


@functools.cache
def _load(path: Path, wanted: str) -> KernelLibrary:
    try:
        library = ctypes.CDLL(str(path))
        found = {name: _text(library, f"dspark_cpu_{name}") for name in ("set", "sets", "error")}
        found["operators"] = _text(library, "dspark_cpu_operators") if hasattr(library, "dspark_cpu_operators") else ""
    except (OSError, AttributeError) as error:
        raise BackendError(
            f"the sequence kernels {path} cannot be loaded: {error}; {HOW_TO_GET}, or set {LIBRARY_VARIABLE}=none"
        ) from error
    if not found["set"]:
        raise BackendError(f"{path}: {found['error']}; set {SET_VARIABLE} to another instruction set, or unset it")
    return KernelLibrary(path, found["set"], tuple(found["sets"].split()), frozenset(found["operators"].split()))


def _text(library: ctypes.CDLL, name: str) -> str:
    function = getattr(library, name)
    function.argtypes, function.restype = [], ctypes.c_char_p
    value = function()
    return value.decode() if isinstance(value, bytes) else ""


def missing_operators(wanted: frozenset[str]) -> frozenset[str]:
    """Those of ``wanted`` that cannot run here as kernels: all of them without a library."""
    library = kernel_library()
    if library is None:
        return wanted
    return wanted - library.operators if library.operators else frozenset()


@functools.cache
def say_what_is_lost(reason: str) -> None:
    """Warn, once for each ``reason``, that a bundle runs without the kernels its graphs were made for.

    Whoever asked for no library knows.
    """
    if os.environ.get(LIBRARY_VARIABLE) == NO_LIBRARY:
        return
    warnings.warn(f"{reason}: {LOSS}; {HOW_TO_GET}", SlowerWithoutKernels, stacklevel=2)
