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
LOSS_OF_SOME = "standard operators run in their place, which are slower and round by the number of rows"


class SlowerWithoutKernels(UserWarning):
    """Some or all of a bundle runs on ONNX Runtime's operators although it has graphs for the sequence kernels."""


@dataclass(frozen=True)
class KernelLibrary:
    """A library that loads here. ``instruction_set`` is the one in use, ``sets`` all that run here, best first.

    ``operators``: the names it registers; empty for a library that is too old to name them.
    """

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
    """Those of ``wanted`` that are not known to run here as kernels.

    All of them without a library, or with one too old to name its operators.
    """
    library = kernel_library()
    return wanted if library is None else wanted - library.operators


def say_what_is_lost(wanted: frozenset[str]) -> None:
    """Warn, once, that the kernels ``wanted`` by a bundle do not all run here; silent if they do.

    Whoever asked for no library knows.
    """
    missing, library = missing_operators(wanted), kernel_library()
    if not missing or os.environ.get(LIBRARY_VARIABLE) == NO_LIBRARY:
        return
    if library is None:
        _warn_once(f"this installation has no library of sequence kernels: {LOSS}")
    elif not library.operators:
        _warn_once(f"{library.path} is too old to name its sequence kernels: for any it lacks, {LOSS_OF_SOME}")
    else:
        _warn_once(f"{library.path} lacks the sequence kernels {', '.join(sorted(missing))}: {LOSS_OF_SOME}")


@functools.cache
def _warn_once(text: str) -> None:
    warnings.warn(f"{text}; {HOW_TO_GET}", SlowerWithoutKernels, stacklevel=3)
