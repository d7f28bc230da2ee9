"""The launches the runtime makes itself, carried out by the imitated device, against the host build: equal to the last
bit. So grids, blocks, arguments and workspaces are those the kernels expect."""

from __future__ import annotations

import ctypes
import importlib
import re
from pathlib import Path

import numpy as np
import pytest

from dspark_runtime import errors
from dspark_runtime.backends import cuda, plugin_kernels, plugin_launches
from dspark_runtime.backends.plugin_kernels import PluginKernels
from dspark_runtime.backends.plugin_launches import (
    DeviceTensor,
    Markov,
    cache_table,
    draft_workspace,
    verify_tree,
    verify_workspace,
)
from dspark_runtime.backends.tensorrt_device import this_device
from dspark_runtime.speculation.sampling import SamplingParams
from tests.plugins.conftest import PLUGINS
from tests.plugins.host_library import DTYPES, KINDS, HostLibrary
from tests.plugins.launched import Imitated, check_compaction, check_drafting, check_verification, verdicts
from tests.plugins.test_host_verify import random_tree, tree_inputs


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Imitated:
    return Imitated.make(tmp_path_factory.mktemp("launched"))


@pytest.mark.parametrize("family", ["tree", "chain"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_verification(host: HostLibrary, device: Imitated, dtype: str, family: str) -> None:
    for processors, batch, rows, vocab in ((1, 3, 6, 900), (4, 1, 1, 7), (130, 2, 2, 9000)):
        check_verification(device, host, dtype, family, processors, vocab, rows, batch)


@pytest.mark.parametrize("processors", [1, 40])
@pytest.mark.parametrize("kind", KINDS)
def test_drafting(host: HostLibrary, device: Imitated, kind: Markov, processors: int) -> None:
    check_drafting(device, host, kind, processors)


@pytest.mark.parametrize("width", [3, 16, 64])
def test_compaction(host: HostLibrary, device: Imitated, width: int) -> None:
    assert check_compaction(device, host, width) == device.library.emulation_cache_table()


def test_workspaces_are_those_of_the_kernels(device: Imitated) -> None:
    for batch, rows, rank in ((1, 1, 0), (3, 7, 5), (256, 128, 1024)):
        assert verify_workspace(batch, rows) == device.library.emulation_verify_workspace(
            ctypes.c_int64(batch), ctypes.c_int64(rows)
        )
        assert draft_workspace(batch, rows, rank) == device.library.emulation_draft_workspace(
            ctypes.c_int64(batch), ctypes.c_int64(rows), ctypes.c_int64(rank)
        )


def test_constants_are_those_of_the_headers() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in PLUGINS.rglob("*") if path.suffix in (".h", ".cu"))
    for name, value in {
        "kBlockThreads": plugin_launches.BLOCK_THREADS,
        "kDraftThreads": plugin_launches.DRAFT_THREADS,
        "kCompactThreads": plugin_launches.COMPACT_THREADS,
        "kMaxBatch": plugin_launches.MAX_BATCH,
        "kMaxVerifyRows": plugin_launches.MAX_ROWS,
        "kMaxVocab": plugin_launches.MAX_VOCAB,
        "kMaxRank": plugin_launches.MAX_RANK,
        "kMaxTiles": plugin_launches.MAX_TILES,
        "kDraftSequences": plugin_launches.DRAFT_SEQUENCES,
        "kMaxCacheTensors": plugin_launches.MAX_CACHE_TENSORS,
    }.items():
        assert f"constexpr int {name} = {value};" in text, name


def test_wrong_tensors_are_named(device: Imitated) -> None:
    rng = np.random.default_rng(24)
    logits = rng.normal(size=(2, 3, 8)).astype(np.float16)
    trees = [random_tree(rng, rows, 0.9) for rows in logits]
    inputs = device.tensors(tree_inputs(rng, trees, logits, [SamplingParams()] * 2))
    outputs = device.tensors(verdicts(2, 3))
    with pytest.raises(errors.BackendError, match=r"VerifyTree needs tokens as int64 \[2, 3\], given is nothing"):
        verify_tree({name: t for name, t in inputs.items() if name != "tokens"}, outputs, 0, 4)
    wrong = DeviceTensor(0, (2,), "float32")
    with pytest.raises(errors.BackendError, match=r"needs top_k as int64 \[2\], given is float32 \[2\]"):
        verify_tree({**inputs, "top_k": wrong}, outputs, 0, 4)
    with pytest.raises(errors.BackendError, match="needs logits with 3 dimensions in float32, float16, bfloat16"):
        verify_tree({**inputs, "logits": wrong}, outputs, 0, 4)
    with pytest.raises(errors.BackendError, match="takes 1 to 128 for rows, not 129; split the pass"):
        verify_tree({**inputs, "logits": DeviceTensor(0, (1, 129, 8), "float16")}, outputs, 0, 4)
    with pytest.raises(errors.BackendError, match="1 to 160 cache tensors, not 0"):
        cache_table(())
    with pytest.raises(errors.BackendError, match="of one batch and one capacity"):
        cache_table((DeviceTensor(0, (1, 1, 4, 8), "float16"), DeviceTensor(0, (1, 1, 5, 8), "float16")))


def test_what_is_missing_to_launch_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin_kernels, "find_spec", lambda name: None)
    with pytest.raises(errors.BackendError, match=r"pip install cuda-core\[cu13\]"):
        PluginKernels()
    monkeypatch.setattr(plugin_kernels, "find_spec", lambda name: object())
    with pytest.raises(errors.BackendError, match=r"there is no .*dspark\.fatbin; build the folder plugins/"):
        PluginKernels(fatbin=tmp_path / "dspark.fatbin")


@pytest.mark.skipif(this_device() is not None, reason="this machine has a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    pytest.importorskip("cuda.core", reason="needs cuda-core (extra `dev`), which is for Linux on x86-64 only")
    fatbin = tmp_path / "dspark.fatbin"
    fatbin.write_bytes(b"never read")
    with pytest.raises(errors.EngineWithoutDevice, match="GPU 0 cannot be used"):
        PluginKernels(fatbin=fatbin)
    with pytest.raises(errors.EngineWithoutDevice, match="GPU 0 cannot be used"):
        cuda.CudaBindings()


def test_what_is_called_of_cuda_is_there() -> None:
    bindings = pytest.importorskip("cuda.bindings", reason="needs cuda-bindings (extra `dev`)")
    assert bindings
    source = Path(cuda.__file__).read_text(encoding="utf-8")
    called = {
        "runtime": re.findall(r'_call\(\s*"(\w+)"|self\._cuda\.(\w+)|\bruntime\.(cuda\w+)', source),
        "driver": re.findall(r"\bdriver\.(cu\w+)", source),
        "nvrtc": re.findall(r"\bnvrtc\.(nvrtc\w+)", source),
    }
    for name, found in called.items():
        module = importlib.import_module(f"cuda.bindings.{name}")
        names = {part for match in found for part in (match if isinstance(match, tuple) else (match,)) if part}
        assert names and not [n for n in names if not hasattr(module, n)]
