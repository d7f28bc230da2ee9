"""The plugins' kernels on a real GPU, launched outside TensorRT, against the host build: equal to the last bit.

Needs a GPU, `pip install cuda-core[cu13]`, and `dspark.fatbin` (docs/plugins.md says how to build it). Their speed
is measured by benchmarks/plugin_kernels.py.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from dspark_runtime.backends.cuda import CudaBindings
from dspark_runtime.backends.plugin_files import FATBIN, plugin_file
from dspark_runtime.backends.plugin_kernels import PluginKernels
from dspark_runtime.backends.plugin_launches import DeviceTensor, Element, Launch, Markov, verify_tree, verify_workspace
from dspark_runtime.backends.tensorrt_device import this_device
from dspark_runtime.speculation.sampling import SamplingParams
from tests.plugins.conftest import host  # noqa: F401  (a fixture)
from tests.plugins.host_library import DTYPES, KINDS, Array, HostLibrary
from tests.plugins.launched import assert_equal, check_compaction, check_drafting, check_verification, verdicts
from tests.plugins.test_host_verify import random_tree, tree_inputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(this_device() is None, reason="needs an NVIDIA GPU; this machine has none"),
    pytest.mark.skipif(plugin_file(FATBIN) is None, reason=f"needs {FATBIN}: build plugins/, or set DSPARK_PLUGINS"),
]


class Gpu:
    """Arrays that live on the GPU between :meth:`tensors` and :meth:`run`."""

    def __init__(self) -> None:
        self.cuda, self.kernels = CudaBindings(), PluginKernels()
        self.stream, self.done = self.cuda.stream("kernels"), self.cuda.event()
        self._lent: list[tuple[int, Array]] = []

    def tensors(self, arrays: Mapping[str, Array]) -> dict[str, DeviceTensor]:
        made = {}
        for name, array in arrays.items():
            address = self.cuda.allocate(array.nbytes)
            self.cuda.copy_in(address, _bytes(array), self.stream)
            self._lent.append((address, array))
            made[name] = DeviceTensor(address, array.shape, cast(Element, array.dtype.name))
        return made

    def run(self, launches: Iterable[Launch]) -> None:
        self.kernels.run(launches, self.stream)
        self.fetch()

    def fetch(self) -> None:
        for address, array in self._lent:
            self.cuda.copy_out(_bytes(array), address, self.stream)
        self.cuda.record(self.done, self.stream)
        self.cuda.synchronize(self.done)
        for address, _ in self._lent:
            self.cuda.free(address)
        self._lent.clear()


def _bytes(array: Array) -> Array:
    assert array.flags.c_contiguous
    return array.reshape(-1).view(np.uint8)


@pytest.fixture(scope="module")
def gpu() -> Gpu:
    return Gpu()


@pytest.mark.parametrize("family", ["tree", "chain"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "rows", "vocab"), [(1, 1, 7), (3, 6, 900), (2, 8, 152_064), (1, 2, 262_144)])
def test_verification(gpu: Gpu, host: HostLibrary, dtype: str, family: str, batch: int, rows: int, vocab: int) -> None:  # noqa: F811
    check_verification(gpu, host, dtype, family, gpu.kernels.processors, vocab, rows, batch)


@pytest.mark.parametrize("kind", KINDS)
def test_drafting(gpu: Gpu, host: HostLibrary, kind: Markov) -> None:  # noqa: F811
    check_drafting(gpu, host, kind, gpu.kernels.processors)


@pytest.mark.parametrize("width", [3, 16, 64])
def test_compaction(gpu: Gpu, host: HostLibrary, width: int) -> None:  # noqa: F811
    check_compaction(gpu, host, width)


def test_a_sequence_does_not_depend_on_the_others(gpu: Gpu) -> None:
    """The same sequence alone and in a batch of 256 has the same verdict, and so has every repetition."""
    rng = np.random.default_rng(31)
    logits = rng.normal(0, 2, (256, 4, 4099)).astype(np.float16)
    trees = [random_tree(rng, rows, 0.9) for rows in logits]
    inputs = tree_inputs(rng, trees, logits, [SamplingParams(0.9, 50, 0.95, 0.01)] * 256)

    def verdict(chosen: slice) -> tuple[Array, ...]:
        part = {name: np.ascontiguousarray(array[chosen]) for name, array in inputs.items()}
        batch = len(part["tokens"])
        found, memory = verdicts(batch, 4), {"workspace": np.zeros(verify_workspace(batch, 4), np.uint8)}
        address = gpu.tensors(memory)["workspace"].address
        gpu.run(verify_tree(gpu.tensors(part), gpu.tensors(found), address, gpu.kernels.processors))
        return tuple(found.values())

    together = verdict(slice(None))
    assert_equal(verdict(slice(None)), together)
    for i in (0, 100, 255):
        assert_equal(verdict(slice(i, i + 1)), (array[i : i + 1] for array in together))


def test_launches_are_captured_in_a_graph(gpu: Gpu, host: HostLibrary) -> None:  # noqa: F811
    rng = np.random.default_rng(32)
    logits = rng.normal(0, 2, (2, 5, 3000)).astype(np.float16)
    trees = [random_tree(rng, rows, 0.9) for rows in logits]
    inputs = tree_inputs(rng, trees, logits, [SamplingParams(1.0)] * 2)
    found, memory = verdicts(2, 5), {"workspace": np.zeros(verify_workspace(2, 5), np.uint8)}
    workspace = gpu.tensors(memory)["workspace"].address
    launches = verify_tree(gpu.tensors(inputs), gpu.tensors(found), workspace, gpu.kernels.processors)
    gpu.kernels.run(launches, gpu.stream)  # loads the kernel, which cannot be captured
    gpu.cuda.begin_capture(gpu.stream)
    gpu.kernels.run(launches, gpu.stream)
    graph = gpu.cuda.end_capture(gpu.stream)
    assert graph
    for _ in range(3):
        gpu.cuda.launch(graph, gpu.stream)
    gpu.fetch()
    assert_equal(found.values(), host.verify_tree(inputs))


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_the_sanitizer_finds_nothing(tool: str) -> None:
    """The tests above, but for the largest, under compute-sanitizer."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("needs compute-sanitizer of the CUDA toolkit; none is on the path")
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "pytest", "-q", "-p"]
    command += ["no:cacheprovider", str(Path(__file__)), "-m", "not slow", "-k", "not 152064 and not 262144"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
