"""A Triton server without a container, for checks and tests: the one inside the wheel ``nvidia-pytriton``.

It has the Python backend alone, which is all a written model needs. What it takes to start it:

* a folder for the backend, with the stub of the Python in use beside the backend's library;
* ``LD_LIBRARY_PATH`` with the wheel's libraries, which the moved stub does not find by itself, and with the Python's
  own library. Without them the server waits for its model until the time is up, and says nothing;
* packages on ``PYTHONPATH``, which ``model.py`` reads, since the stub's interpreter is an isolated one;
* numpy below 2: with numpy 2 the stub dies of the first text it is sent.

All of it goes into a folder of its own, with an environment and a ``bin/tritonserver`` that starts the server.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import filelock

from dspark_runtime.errors import BackendError

SERVER = "nvidia-pytriton==0.7.0"
NUMPY = "numpy==1.26.4"
CLIENT = "tritonclient[grpc]==2.73.0"
_PYTHONS = ((3, 12), (3, 11))  # that have this numpy and the runtime
_ASK = "import sys, sysconfig as s; print(*sys.version_info[:2], *s.get_config_vars('LIBDIR', 'INSTSONAME'))"


def prepare(folder: Path, packages: list[str]) -> Path:
    """Install the server, its client and ``packages`` into ``folder``, unless they are there.

    Returns the folder with the command ``tritonserver``, for the PATH.

    Takes about half a minute and 400 MB the first time.

    Raises:
        BackendError: no fitting Python, or the packages cannot be had; the message says which.
    """
    folder = folder.resolve()
    packages = [*packages, CLIENT]
    wanted = "\n".join([SERVER, NUMPY, *packages])
    stamp = folder / "installed.txt"
    folder.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder / "lock"):
        if not stamp.is_file() or stamp.read_text(encoding="utf-8") != wanted:
            for part in ("environment", "backends", "bin"):
                shutil.rmtree(folder / part, ignore_errors=True)
            _install(folder, packages)
            stamp.write_text(wanted, encoding="utf-8")
    return folder / "bin"


def python_of(folder: Path) -> Path:
    """The Python of a prepared folder."""
    return folder / "environment" / "bin" / "python"


def _install(folder: Path, packages: list[str]) -> None:
    python, version, library = _fitting_python()
    _run([python, "-m", "venv", str(folder / "environment")], "make an environment")
    pip = [str(python_of(folder)), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    _run([*pip, "--no-deps", SERVER], f"install {SERVER}, which holds Triton")  # its dependencies serve its Python API
    _run([*pip, NUMPY, *packages], f"install what the model needs ({', '.join([NUMPY, *packages])})")
    site = folder / "environment" / "lib" / f"python{version}" / "site-packages"
    server, backend = site / "pytriton" / "tritonserver", folder / "backends" / "python"
    shutil.copytree(server / "backends" / "python", backend, ignore=shutil.ignore_patterns("__pycache__"))
    stub = shutil.copy2(server / "python_backend_stubs" / version / "triton_python_backend_stub", backend)
    for program in (Path(stub), server / "bin" / "tritonserver"):
        program.chmod(0o755)
    libraries = f"{site / 'nvidia_pytriton.libs'}{os.pathsep}{library}"
    command = folder / "bin" / "tritonserver"
    command.parent.mkdir()
    command.write_text(
        "#!/bin/sh\n"
        f'export LD_LIBRARY_PATH="{libraries}${{LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}}"\n'
        f'export PYTHONPATH="${{PYTHONPATH:+$PYTHONPATH:}}{site}"\n'
        f'exec "{server / "bin" / "tritonserver"}" --backend-directory="{folder / "backends"}" "$@"\n',
        encoding="utf-8",
    )
    command.chmod(0o755)


def _fitting_python() -> tuple[str, str, Path]:
    """A Python's command, its version as text, and the folder of its shared library."""
    names = [sys.executable, *(f"python{major}.{minor}" for major, minor in _PYTHONS)]
    for name in filter(None, map(shutil.which, names)):
        done = subprocess.run([name, "-c", _ASK], capture_output=True, text=True, check=False)
        words = done.stdout.split()
        if done.returncode or len(words) != 4 or (int(words[0]), int(words[1])) not in _PYTHONS:
            continue
        if (Path(words[2]) / words[3]).is_file() and ".so" in words[3]:
            return name, f"{words[0]}.{words[1]}", Path(words[2])
    wanted = " or ".join(f"{major}.{minor}" for major, minor in _PYTHONS)
    raise BackendError(
        f"the Triton server in {SERVER} needs Python {wanted} with its shared library (libpython), and none was found; "
        f"install one (on Debian: python3.11 and libpython3.11), or use NVIDIA's container"
    )


def _run(command: list[str], what: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        errors = [line for line in lines if "error" in line.lower()] or lines
        raise BackendError(f"could not {what}: {errors[-1] if errors else 'no message'}")
