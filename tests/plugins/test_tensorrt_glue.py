"""The TensorRT side of the plugin library: compiled against TensorRT's headers, and taken through TensorRT's calls with
the kernels imitated.

TensorRT's headers are not in this repository: set TENSORRT_INCLUDE_DIR to the folder with NvInferRuntime.h. CUDA's come
with nvcc; CUDA_INCLUDE_DIR names another place.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dspark_runtime.speculation.sampling import SamplingParams
from tests.plugins.conftest import FLAGS, PLUGINS, ROOT
from tests.plugins.draft_cases import draft_case
from tests.plugins.host_library import KINDS, Array, HostLibrary
from tests.plugins.test_host_draft import moved
from tests.plugins.test_host_verify import chain_inputs, random_params, random_tree, tree_inputs

SOURCES = sorted((PLUGINS / "tensorrt").glob("*.cpp"))
TYPES = {"float32": 0, "float16": 1, "bool": 4, "bfloat16": 7, "int64": 8}
TREE = ("logits", "tokens", "ancestors", "uniforms", "temperature", "top_k", "top_p", "min_p")
CHAIN = ("logits", "tokens", "draft_probs", "drafted", "accept_uniforms", "draw_uniforms", *TREE[4:])
BLOCK = ("base_logits", "hidden_rows", "anchors", "temperature", "uniforms", "w1", "w2", "mix", "mix_bias")


@pytest.fixture(scope="module")
def headers() -> list[str]:
    """Compiler options that find TensorRT's and CUDA's headers."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++; none is on the path")
    given = os.environ.get("TENSORRT_INCLUDE_DIR")
    if not given:
        pytest.skip("needs TensorRT's headers: set TENSORRT_INCLUDE_DIR to the folder with NvInferRuntime.h")
    if not (Path(given) / "NvInferRuntime.h").is_file():
        pytest.fail(f"TENSORRT_INCLUDE_DIR is {given}, which has no NvInferRuntime.h")
    nvcc = shutil.which("nvcc")
    places = [os.environ.get("CUDA_INCLUDE_DIR"), "/usr/local/cuda/include"]
    places += [str(Path(nvcc).resolve().parents[1] / "include")] if nvcc else []
    cuda = next((place for place in places if place and (Path(place) / "cuda_runtime_api.h").is_file()), None)
    if cuda is None:
        pytest.skip("needs CUDA's headers: set CUDA_INCLUDE_DIR to the folder with cuda_runtime_api.h")
    return [f"-I{given}", f"-isystem{cuda}"]


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_it_compiles_without_a_warning(headers: list[str], source: Path) -> None:
    done = subprocess.run(
        ["g++", "-fsyntax-only", *FLAGS, *headers, str(source)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


class Glue:
    """A plugin taken through its life; see emulation/glue.cpp."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._library.glue_log.restype = self._library.glue_version.restype = ctypes.c_char_p

    @property
    def log(self) -> str:
        return self._library.glue_log().decode()

    def version(self, name: str) -> str:
        return self._library.glue_version(name.encode()).decode()

    def run(
        self,
        name: str,
        attributes: dict[str, int],
        inputs: Sequence[Array],
        outputs: Sequence[Array],
        wide: bool = False,
    ) -> int:
        """0, or the number of the step that failed."""
        arrays = [*inputs, *outputs]
        dims = np.zeros((len(arrays), 8), np.int64)
        for i, array in enumerate(arrays):
            assert array.flags.c_contiguous
            dims[i, : array.ndim] = array.shape
        types = np.array([TYPES[array.dtype.name] for array in arrays], np.int32)
        ranks = np.array([array.ndim for array in arrays], np.int32)
        values = np.array([*attributes.values(), 0], np.int32)
        names = (ctypes.c_char_p * (len(attributes) + 1))(*(key.encode() for key in attributes))
        pointers: list[Any] = [
            (ctypes.c_void_p * len(part))(*(array.ctypes.data for array in part)) for part in (inputs, outputs)
        ]
        numbers = [ctypes.c_void_p(array.ctypes.data) for array in (values, types, ranks, dims)]
        return self._library.glue_run(
            *(name.encode(), len(attributes), names, numbers[0], int(wide), len(inputs), len(outputs)),
            *(*numbers[1:], *pointers),
        )


@pytest.fixture(scope="module")
def glue(headers: list[str], tmp_path_factory: pytest.TempPathFactory) -> Glue:
    folder = tmp_path_factory.mktemp("glue")
    emulation = ROOT / "tests" / "plugins" / "emulation"
    objects = []
    for source in (*SOURCES, emulation / "glue.cpp", emulation / "library.cpp"):
        objects.append(folder / f"{source.stem}.o")
        options = ["-DDSPARK_EMULATED"] if source.stem == "library" else headers
        command = ["g++", "-O1", "-fPIC", *FLAGS, *options, "-c", str(source), "-o", str(objects[-1])]
        subprocess.run(command, check=True)
    output = folder / "libglue.so"
    subprocess.run(["g++", "-shared", *map(str, objects), "-o", str(output)], check=True)
    return Glue(output)


def test_the_plugins_are_found_by_name_and_version(glue: Glue) -> None:
    for name in ("VerifyTree", "VerifyChain", "DraftBlock", "CompactCache"):
        assert glue.version(name) == f"dspark::{name} 1"
    assert glue.version("Verify") == ""


def test_trees_and_chains(glue: Glue, host: HostLibrary) -> None:
    rng = np.random.default_rng(0)
    for dtype in (np.float32, np.float16):
        logits = rng.normal(0, 2, (2, 5, 40)).astype(dtype)
        params = [random_params(rng), SamplingParams()]
        verdict = [np.zeros((2, 5), np.int64), np.zeros((2, 5), np.int64), np.zeros(2, np.int64)]
        inputs = tree_inputs(rng, [random_tree(rng, rows, 0.9) for rows in logits], logits, params)
        assert glue.run("VerifyTree", {}, [inputs[name] for name in TREE], verdict) == 0, glue.log
        assert all(np.array_equal(a, b) for a, b in zip(verdict, host.verify_tree(inputs), strict=True))
        inputs = chain_inputs(rng, logits, params)
        assert glue.run("VerifyChain", {}, [inputs[name] for name in CHAIN], verdict) == 0, glue.log
        assert all(np.array_equal(a, b) for a, b in zip(verdict, host.verify_chain(inputs), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_blocks(glue: Glue, host: HostLibrary, kind: str) -> None:
    rng = np.random.default_rng(1)
    for i, confident in enumerate(("none", "hidden", "token")):
        case = draft_case(rng, kind, "float16", mapped=i > 0, confident=confident)
        expected = host.draft_block(kind, case)
        given = [case[name] for name in (*BLOCK, "confidence", "confidence_bias", "token_map") if name in case]
        outputs = [np.zeros_like(array) for array in (expected if confident != "none" else expected[:2])]
        attributes = {"kind": KINDS[kind], "confidence": i, "mapped": int(i > 0)}
        assert glue.run("DraftBlock", attributes, given, outputs, wide=i == 1) == 0, glue.log
        assert all(np.array_equal(a, b) for a, b in zip(outputs, expected, strict=False))


@pytest.mark.parametrize("aliased", [True, False])
@pytest.mark.parametrize("width", [5, 8])
def test_caches(glue: Glue, aliased: bool, width: int) -> None:
    rng = np.random.default_rng(2)
    caches = [rng.normal(0, 1, (2, heads, 12, width)).astype(np.float16) for heads in (1, 3)]
    path = np.array([[0, 2, 4, -1, -1], [0, 1, -1, -1, -1]])
    accepted, starts = np.array([2, 1]), np.array([7, 3])
    expected = [moved(cache, path, accepted, starts) for cache in caches]
    outputs = caches if aliased else [np.zeros_like(cache) for cache in caches]
    assert glue.run("CompactCache", {"caches": 2}, [path, accepted, starts, *caches], outputs) == 0, glue.log
    assert all(np.array_equal(a, b) for a, b in zip(outputs, expected, strict=True))


def test_what_cannot_be_is_refused_with_words(glue: Glue) -> None:
    rng = np.random.default_rng(3)

    def verify(logits: Array) -> int:
        batch, rows = logits.shape[:2]
        tree = random_tree(rng, logits[0, :1], 0)
        inputs = tree_inputs(rng, [tree] * batch, logits, [SamplingParams()] * batch)
        outputs = [np.zeros((batch, rows), np.int64), np.zeros((batch, rows), np.int64), np.zeros(batch, np.int64)]
        return glue.run("VerifyTree", {}, [inputs[name] for name in TREE], outputs)

    assert verify(np.zeros((1, 129, 2), np.float32)) == 5
    assert glue.log.startswith("VerifyTree: 129 rows are more than the 128 it takes; build the engine with smaller")
    assert verify(np.zeros((257, 1, 2), np.float32)) == 5
    assert verify(np.zeros((1, 1, 262145), np.float32)) == 5
    assert glue.run("DraftBlock", {"kind": 7, "confidence": 0, "mapped": 0}, [], []) == 2
    assert glue.log == "DraftBlock: kind=7; give 0 to 3\n"
    assert glue.run("DraftBlock", {"kind": 1, "confidence": 0, "map": 0}, [], []) == 2
    assert glue.log == "DraftBlock: needs the whole-number attribute 'mapped'\n"
    assert glue.run("CompactCache", {"caches": 161}, [], []) == 2
    one = np.zeros((1, 1), np.int64)
    wrong = [np.zeros((1, 1, 4, 2), np.float16), np.zeros((1, 1, 4, 2), np.float32)]
    assert glue.run("CompactCache", {"caches": 2}, [one, one[0], one[0], *wrong], wrong) == 104
    assert glue.run("CompactCache", {"caches": 2}, [one, one[0], one[0], wrong[0]], wrong) == 100
    assert "given 4 inputs and 2 outputs, but with these attributes there are 5 and 2" in glue.log
