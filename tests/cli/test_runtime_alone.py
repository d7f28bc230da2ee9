"""``dspark-runtime`` alone opens a bundle and generates, without what only builds need."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from dspark_runtime import Bundle
from dspark_runtime.backends.ort_kernels import LIBRARY_VARIABLE
from tests.distributions import ROOT, build, built_wheel

MOST_BYTES = {"cpu": 300_000_000, "cpu,serve": 350_000_000}
KERNELS = "from dspark_runtime.backends.ort_kernels import kernel_library as k; print(k().path)"
GENERATE = """
import sys
import dspark_runtime
from dspark_runtime import Bundle

print(dspark_runtime.__file__)
print(Bundle.open(sys.argv[1], threads=1).generate("once upon a time", max_new_tokens=12, ignore_eos=True).tokens)
"""
SERVE = """
import json, sys, threading, urllib.request
import dspark_serve
from pathlib import Path
from dspark_runtime import ServiceOptions
from dspark_serve import cli, server

print(dspark_serve.__file__)

def ask(text):
    print(text.split(":")[0])
    if " is ready at " not in text:
        return
    body = {"model": "b", "prompt": "once upon a time", "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    headers = {"Content-Type": "application/json"}

    def answer():
        url = text.split(" at ")[1] + "/completions"
        with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), headers)) as reply:
            print(repr(json.load(reply)["choices"][0]["text"]))
        import os, signal
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=answer).start()

options = server.ServerOptions(port=0, name="b", service=ServiceOptions(rows=1, capacity=64))
server.serve(Path(sys.argv[1]), options, ask, threads=1)
"""
WITHOUT = """
import sys

class Without:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {others!r}:
            raise ModuleNotFoundError(f"{{name}} is not a dependency of dspark-runtime", name=name)

# An editable installation of the checkout would answer before the unpacked wheel.
sys.meta_path[:] = [finder for finder in sys.meta_path if "_editable_" not in type(finder).__module__]
sys.meta_path.insert(0, Without())
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A freshly built wheel of the runtime, as it is without a compiler."""
    return built_wheel(ROOT / "runtime", tmp_path_factory.mktemp("wheel"), CXX="/bin/false")


@pytest.fixture(scope="module")
def expected(bundle: Path) -> str:
    """What the program prints last."""
    opened = Bundle.open(bundle, threads=1)
    return str(opened.generate("once upon a time", max_new_tokens=12, ignore_eos=True).tokens)


def dependencies(wheel: Path, extra: str) -> set[str]:
    """Names of everything that installing ``wheel`` with ``extra`` installs, judged by what is installed here."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        first = metadata.PathDistribution(zipfile.Path(archive, name.removesuffix("METADATA")))
        waiting, found = [(first.requires or [], {extra})], set[str]()
        while waiting:
            lines, wanted = waiting.pop()
            for requirement in map(Requirement, lines):
                if requirement.marker and not any(requirement.marker.evaluate({"extra": e}) for e in {"", *wanted}):
                    continue
                if requirement.name.lower() not in found:
                    found.add(requirement.name.lower())
                    waiting.append((metadata.requires(requirement.name) or [], requirement.extras))
    return found


def test_nothing_but_its_dependencies_is_imported(wheel: Path, bundle: Path, expected: str, tmp_path: Path) -> None:
    names = {name.replace("_", "-") for name in dependencies(wheel, "cpu")}
    assert {"numpy", "onnxruntime", "tokenizers"} <= names
    assert not names & {"torch", "transformers", "onnx", "onnx-ir", "onnxscript", "matplotlib", "dspark-export"}
    modules = metadata.packages_distributions()
    others = {m for m, owners in modules.items() if not {o.lower().replace("_", "-") for o in owners} & names}
    assert {"torch", "transformers", "onnx"} <= others
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            WITHOUT.format(others={*others, "dspark_export"} - {"dspark_runtime"}) + GENERATE,
            str(bundle),
        ],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    place, tokens = done.stdout.splitlines()
    assert Path(place).is_relative_to(tmp_path)
    assert tokens == expected


def test_serving_imports_nothing_but_the_extra(wheel: Path, bundle: Path, tmp_path: Path) -> None:
    names = {name.replace("_", "-") for extra in ("cpu", "serve") for name in dependencies(wheel, extra)}
    assert {"fastapi", "uvicorn", "llguidance", "prometheus-client", "sse-starlette"} <= names
    assert not names & {"torch", "transformers", "onnx", "dspark-export", "openai", "httpx", "ray"}
    modules = metadata.packages_distributions()
    others = {m for m, owners in modules.items() if not {o.lower().replace("_", "-") for o in owners} & names}
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    without = WITHOUT.format(others={*others, "dspark_export"} - {"dspark_runtime", "dspark_serve"})
    done = subprocess.run(
        [sys.executable, "-c", without + SERVE, str(bundle)],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    place, *_, text = done.stdout.splitlines()
    assert Path(place).is_relative_to(tmp_path)
    opened = Bundle.open(bundle, threads=1)
    assert text == repr(opened.generate("once upon a time", max_new_tokens=12, ignore_eos=True).text)


@pytest.mark.slow
@pytest.mark.parametrize("extras", MOST_BYTES)
def test_a_fresh_environment(bundle: Path, expected: str, tmp_path: Path, extras: str) -> None:
    """Installed from the sdist, as where there is no wheel for the machine: the kernels are compiled on the way."""
    build(ROOT / "runtime", tmp_path, "sdist")
    (source,) = tmp_path.glob("*.tar.gz")
    venv.create(tmp_path / "fresh", with_pip=True)
    python = tmp_path / "fresh" / "bin" / "python"
    (site,) = (tmp_path / "fresh").glob("lib/python3*/site-packages")
    before = _bytes(site)
    pip = [str(python), "-m", "pip", "install", "--quiet", "-c", str(ROOT / "constraints.txt"), f"{source}[{extras}]"]
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", LIBRARY_VARIABLE)}
    subprocess.run(pip, env=environment, check=True)
    kernels = subprocess.run([str(python), "-c", KERNELS], env=environment, capture_output=True, text=True, check=False)
    assert kernels.returncode == 0, kernels.stderr
    assert Path(kernels.stdout.strip()).is_relative_to(site / "dspark_runtime")
    done = subprocess.run(
        [str(python), "-c", GENERATE, str(bundle)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1] == expected
    if extras == "cpu,serve":
        served = subprocess.run(
            [str(python), "-c", SERVE, str(bundle)], env=environment, capture_output=True, text=True, check=False
        )
        assert served.returncode == 0, served.stderr
    size = _bytes(site) - before
    print(f"dspark-runtime[{extras}] takes {size / 1e6:.0f} MB")
    assert size < MOST_BYTES[extras]
    if extras == "cpu":
        for text in (ROOT / "README.md", ROOT / "docs" / "python-api.md"):
            (said,) = re.findall(r"dspark-runtime\[cpu\]\"`[^.]*?(\d+) MB", text.read_text(encoding="utf-8"))
            assert size / 1e6 == pytest.approx(int(said), rel=0.05), f"{text.name} says {said} MB"


def _bytes(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())
