"""Compiles the sequence kernels: ``python -m dspark_runtime.backends.build_kernels``.

Every file of ``plugins/cpu`` is compiled by a C++17 compiler and linked into one library. Files of ``sets/`` name
their own flags in their first line. The library goes to the cache, under a digest of its sources, so that changed
sources are compiled again and a library built from other sources is never loaded.

``DSPARK_CPU_SOURCES`` names another folder with sources, ``DSPARK_CACHE`` another cache, ``CXX`` another compiler.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

from dspark_runtime.errors import BackendError

SOURCES_VARIABLE, CACHE_VARIABLE = "DSPARK_CPU_SOURCES", "DSPARK_CACHE"
LIBRARY = {"Darwin": "libdspark_cpu.dylib", "Windows": "dspark_cpu.dll"}.get(platform.system(), "libdspark_cpu.so")
COMMAND = "python -m dspark_runtime.backends.build_kernels"
FLAGS = ("-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off")
_SET_FLAGS = "// flags:"
_PACKAGE = Path(__file__).resolve().parents[1]
_CHECKOUT = Path(__file__).resolve().parents[3] / "plugins" / "cpu"


def sources() -> Path | None:
    """The folder of the kernels' sources: the variable's, the package's, or a checkout's; None if there is none."""
    given = os.environ.get(SOURCES_VARIABLE)
    for folder in (Path(given),) if given else (_PACKAGE / "cpu", _CHECKOUT):
        if any(folder.glob("**/*.cpp")):
            return folder
    return None


def compiler() -> list[str] | None:
    """The command of a C++ compiler: ``CXX``, g++, clang++, or the ``ziglang`` package's; None if there is none."""
    given = shlex.split(os.environ.get("CXX", ""))
    if given:
        return given
    for name in ("g++", "clang++", "c++"):
        if (found := shutil.which(name)) is not None:
            return [found]
    return [sys.executable, "-m", "ziglang", "c++"] if find_spec("ziglang") is not None else None


def cache() -> Path:
    """Where compiled libraries are kept."""
    given = os.environ.get(CACHE_VARIABLE)
    if given:
        return Path(given)
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "dspark"


def cached_library(folder: Path) -> Path:
    """Where the library of the sources in ``folder`` belongs; it need not exist."""
    return cache() / f"cpu-{_digest(str(folder))}" / LIBRARY


@functools.cache
def _digest(folder: str) -> str:
    digest = hashlib.sha256(" ".join((platform.system(), platform.machine(), *FLAGS)).encode())
    for path in sorted(p for p in Path(folder).rglob("*") if p.suffix in (".cpp", ".h")):
        digest.update(f"\0{path.relative_to(folder).as_posix()}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def build() -> Path:
    """Compile the library into the cache, if it is not there yet, and return its path.

    Raises:
        BackendError: no sources, no compiler, or the compiler failed; the message says what to do.
    """
    folder = sources()
    if folder is None:
        raise BackendError(
            "this installation has no sources of the sequence kernels; install dspark-runtime from a wheel of this "
            f"platform, or set {SOURCES_VARIABLE} to plugins/cpu of the sources"
        )
    library = cached_library(folder)
    if library.is_file():
        return library
    command = compiler()
    if command is None:
        raise BackendError("no C++ compiler was found; install g++ or clang++, or run `pip install ziglang`")
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        made = _compile(command, folder, Path(scratch))
        os.replace(made, library)  # another process may have been faster; both made the same
    return library


def _compile(command: list[str], folder: Path, scratch: Path) -> Path:
    files = sorted(folder.rglob("*.cpp"))

    def compiled(path: Path) -> str:
        target = scratch / f"{path.relative_to(folder).with_suffix('').as_posix().replace('/', '_')}.o"
        _run([*command, *FLAGS, *_flags_of(path, folder), f"-I{folder}", "-c", str(path), "-o", str(target)])
        return str(target)

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        objects = list(pool.map(compiled, files))
    made = scratch / LIBRARY
    _run([*command, "-shared", *objects, "-o", str(made)])
    return made


def _flags_of(path: Path, folder: Path) -> list[str]:
    """Flags in the first line of an instruction set's file; none where the set is for other machines."""
    if path.parent != folder / "sets":
        return []
    with path.open(encoding="utf-8") as file:
        first = file.readline().strip()
    flags = first.removeprefix(_SET_FLAGS).split() if first.startswith(_SET_FLAGS) else []
    arm, machine_is_arm = "neon" in path.stem, platform.machine().lower() in ("aarch64", "arm64")
    fits = path.stem == "portable" or arm == machine_is_arm
    return flags if fits else []


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise BackendError(f"the compiler {command[0]} cannot be run ({error}); set CXX to another one") from error
    if done.returncode != 0:
        raise BackendError(f"compiling the sequence kernels failed:\n{shlex.join(command)}\n{done.stderr[-4000:]}")


def main() -> int:
    """Build and print the library's path."""
    try:
        print(build())
    except BackendError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
