"""The tests of the host build once more, on a library built with address and undefined-behaviour sanitizers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.plugins.conftest import ROOT, compile_host

SANITIZE = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-shared", "-fPIC")
TESTS = [f"tests/plugins/test_host_{name}.py" for name in ("draft", "sampling", "verify")]
OVERRUN = """
import sys
import numpy as np
from pathlib import Path
from dspark_runtime.speculation.sampling import SamplingParams
from tests.plugins.host_library import HostLibrary
HostLibrary(Path(sys.argv[1])).draw(np.zeros((2, 500), np.float32), [SamplingParams()] * 2, [0.5])
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    library = compile_host(tmp_path_factory.mktemp("sanitized") / "libdspark_host.so", *SANITIZE)
    runtimes = []
    for name in ("libasan.so", "libubsan.so"):
        asked = ["g++", f"-print-file-name={name}"]
        found = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
        if not Path(found).is_file():
            pytest.skip(f"needs {name}, which this g++ does not bring")
        runtimes.append(found)
    # Python itself keeps memory until it ends.
    options = {"ASAN_OPTIONS": "detect_leaks=0", "LD_PRELOAD": " ".join(runtimes)}
    return os.environ | options | {"DSPARK_HOST_LIBRARY": str(library), "PYTHONPATH": f"{ROOT}:{ROOT / 'runtime'}"}


def test_no_access_outside_and_nothing_undefined(environment: dict[str, str]) -> None:
    # Statistics over many draws show nothing new here.
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", *TESTS]
    command += ["-k", "not draws_follow and not emits_the_target and not 32000 and not 151936"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


def test_an_access_outside_would_be_found(environment: dict[str, str]) -> None:
    """The caller gives too few random numbers; it is the library that reads past their end."""
    command = [sys.executable, "-c", OVERRUN, environment["DSPARK_HOST_LIBRARY"]]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr
