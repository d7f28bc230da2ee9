"""The runtime is self-contained: neither torch nor transformers nor onnx is imported by using it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.runtime.conftest import Tiny

FORBIDDEN = ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "dspark_export")

REPORT = f"""
import sys
print([name for name in {FORBIDDEN!r} if name in sys.modules])
"""

IMPORT_ALL = """
import importlib, pkgutil
import dspark_runtime, dspark_serve
for name in dspark_runtime.__all__:
    getattr(dspark_runtime, name)
for package in (dspark_runtime, dspark_serve):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
"""

GENERATE = """
from dspark_runtime.backends.ort import OrtEngine
from dspark_runtime.bundle.contract import CacheLayer
from dspark_runtime.speculation.costs import PassCosts
from dspark_runtime.drafters.ngram import NgramDrafter
from dspark_runtime.decoding.loop import DecodingLoop
from dspark_runtime.decoding.request import Limits, make_requests
from dspark_runtime.decoding.schedule import Schedule

engine = OrtEngine({path!r}, name="target", cache={cache!r})
(request,) = make_requests([[1, 2, 3]], Limits(384, 512), max_new_tokens=9)
loop = DecodingLoop(engine, Schedule(PassCosts()), [NgramDrafter()], rows=1, limit=12)
sequence = loop.admit(request)
while loop.busy:
    loop.step()
print(len(sequence.generation().tokens))
"""


def run(code: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\n")


def test_importing_everything() -> None:
    assert run(IMPORT_ALL + REPORT)[0] == "[]"


def test_generating(tiny: Tiny) -> None:
    code = GENERATE.format(path=str(tiny.directory / "target.onnx"), cache=tiny.cache)
    assert run(code + REPORT)[:2] == ["9", "[]"]


@pytest.mark.parametrize("name", ["numpy", "tokenizers", "jinja2", "onnxruntime"])
def test_a_bare_import_loads_nothing_heavy(name: str) -> None:
    assert run(f"import dspark_runtime, sys; print({name!r} in sys.modules)")[0] == "False"


def test_no_source_file_names_a_forbidden_package() -> None:
    import dspark_runtime
    import dspark_serve

    for package in (dspark_runtime, dspark_serve):
        assert package.__file__
        for path in Path(package.__file__).parent.rglob("*.py"):
            for line in path.read_text(encoding="utf-8").splitlines():
                words = line.split()
                if words[:1] in (["import"], ["from"]):
                    assert words[1].split(".")[0] not in FORBIDDEN, (path, line)
