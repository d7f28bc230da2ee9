"""The kernels themselves, run on an imitated device, against the host build: equal to the last bit.

The imitation (tests/plugins/emulation/device.h) runs the sources of plugins/kernels unchanged, threads as fibers in a
random order. It shows wrong indices, missing barriers and workspaces left dirty; not speed, nor races between blocks.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from dspark_runtime.speculation.sampling import SamplingParams
from tests.plugins.conftest import compile_host
from tests.plugins.draft_cases import draft_case
from tests.plugins.host_library import DTYPES, KINDS, Array, HostLibrary, sampling_inputs
from tests.plugins.test_host_sampling import random_logits
from tests.plugins.test_host_sampling import random_params as any_params
from tests.plugins.test_host_verify import chain_inputs, random_params, random_tree, tree_inputs


class Emulated(HostLibrary):
    def configure(self, seed: int, processors: int, workspace: bool) -> None:
        """Order of threads and blocks, how many blocks share the rows, and whether the walking kernels run instead."""
        self._library.emulation_configure(seed, processors, int(workspace))


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    output = tmp_path_factory.mktemp("emulated") / "libemulated.so"
    options = ("-O2", "-shared", "-fPIC", "-DDSPARK_EMULATED")
    return Emulated(compile_host(output, *options, sources=("../tests/plugins/emulation/library.cpp",)))


def launches(device: Emulated, rng: np.random.Generator) -> Iterator[int]:
    """Block sizes to run with, each with another order, number of blocks and way."""
    for workspace in (True, False):
        device.configure(int(rng.integers(2**31)), int(rng.choice([1, 3, 40])), workspace)
        yield int(rng.choice([64, 96]))


def assert_equal(found: tuple[Array, ...], expected: tuple[Array, ...]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert np.array_equal(a, b, equal_nan=a.dtype.kind == "f")


@pytest.mark.parametrize("dtype", DTYPES)
def test_trees(host: HostLibrary, device: Emulated, dtype: str) -> None:
    rng = np.random.default_rng(7)
    for _ in range(40):
        batch, rows, vocab = int(rng.integers(1, 4)), int(rng.choice([1, 2, 9])), int(rng.choice([5, 24, 1100]))
        logits = rng.normal(0, 2, (batch, rows, vocab)).astype(DTYPES[dtype][1])
        trees = [random_tree(rng, logits[i, : rng.integers(1, rows + 1)], 0.9) for i in range(batch)]
        inputs = tree_inputs(rng, trees, logits, [random_params(rng) for _ in range(batch)])
        expected = host.verify_tree(inputs)
        for threads in launches(device, rng):
            assert_equal(device.verify_tree(inputs, threads), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_filter_tie_and_damage(host: HostLibrary, device: Emulated, dtype: str) -> None:
    """One row a sequence, so that its draw shows."""
    rng = np.random.default_rng(8)
    damaged = 0
    for _ in range(25):
        batch, vocab = 6, int(rng.choice([1, 7, 8, 300, 3000]))
        logits = np.stack([random_logits(rng, vocab, dtype) for _ in range(batch)])
        for _ in range(2):
            logits[rng.integers(batch), rng.integers(vocab)] = rng.choice([np.nan, np.inf, -np.inf])
        inputs = {
            "logits": logits[:, None],
            "tokens": np.zeros((batch, 1), np.int64),
            "ancestors": np.ones((batch, 1, 1), bool),
            "uniforms": rng.random((batch, 1)).astype(np.float32),
            **sampling_inputs([any_params(rng, vocab) for _ in range(batch)]),
        }
        expected = host.verify_tree(inputs)
        damaged += int((expected[1] == -1).sum())
        for threads in launches(device, rng):
            assert_equal(device.verify_tree(inputs, threads), expected)
    assert damaged > 3


@pytest.mark.parametrize("dtype", DTYPES)
def test_chains(host: HostLibrary, device: Emulated, dtype: str) -> None:
    rng = np.random.default_rng(9)
    lengths = set()
    for _ in range(40):
        batch, rows, vocab = int(rng.integers(1, 4)), int(rng.choice([1, 2, 5])), int(rng.choice([24, 700]))
        logits = rng.normal(0, 2, (batch, rows, vocab)).astype(DTYPES[dtype][1])
        if rng.random() < 0.2:
            logits[0, -1, 3] = np.nan
        inputs = chain_inputs(rng, np.nan_to_num(logits), [random_params(rng) for _ in range(batch)])
        inputs["logits"] = logits
        expected = host.verify_chain(inputs)
        lengths |= set(expected[2].tolist())
        for threads in launches(device, rng):
            assert_equal(device.verify_chain(inputs, threads), expected)
    assert {0, 1, 2} <= lengths


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_blocks(host: HostLibrary, device: Emulated, kind: str, dtype: str) -> None:
    rng = np.random.default_rng(10)
    for i in range(12):
        case = draft_case(rng, kind, dtype, mapped=i % 2 == 1, confident=("none", "hidden", "token")[i % 3])
        if i % 4 == 3:  # more sequences than one block takes
            names = ("base_logits", "hidden_rows", "anchors", "temperature", "uniforms")
            case |= {name: np.ascontiguousarray(np.concatenate([case[name]] * 11)[:11]) for name in names}
        expected = host.draft_block(kind, case)
        device.configure(int(rng.integers(2**31)), int(rng.choice([1, 2, 30])), True)
        assert_equal(device.draft_block(kind, case, threads=int(rng.choice([64, 96]))), expected)


def test_caches(host: HostLibrary, device: Emulated) -> None:
    rng = np.random.default_rng(11)
    for width in (3, 16, 64):
        batch, capacity = 2, 20
        caches = [rng.integers(-99, 99, (batch, heads, capacity, width)).astype(np.int8) for heads in (1, 4, 2)]
        path = np.array([[0, 2, 3, 7, 8, 11, *[-1] * 6], [0, 1, 2, 3, 4, 9, 10, *[-1] * 5]])
        accepted, starts = np.array([5, 6]), np.array([8, 3])
        expected = [cache.copy() for cache in caches]
        host.compact_cache(expected, path, accepted, starts)
        device.compact_cache(caches, path, accepted, starts)
        assert_equal(tuple(caches), tuple(expected))


def test_sizes_outside_the_limits_are_refused(device: Emulated) -> None:
    rng = np.random.default_rng(0)
    device.configure(0, 4, True)
    logits = np.zeros((1, 129, 2), np.float32)
    tree = random_tree(rng, logits[0, :1], 0)
    inputs = tree_inputs(rng, [tree], logits, [SamplingParams()])
    with pytest.raises(ValueError, match="error 100"):
        device.verify_tree(inputs)
    inputs = tree_inputs(rng, [tree], logits[:, :1], [SamplingParams()])
    for threads in (32, 100, 1024):
        with pytest.raises(ValueError, match="error 100"):
            device.verify_tree(inputs, threads)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_full_vocabulary(host: HostLibrary, device: Emulated, dtype: str) -> None:
    rng = np.random.default_rng(12)
    vocab, params = 262_144, [SamplingParams(), SamplingParams(1.0), SamplingParams(0.75, 40, 0.875, 0.0625)]
    logits = rng.normal(0, 2.5, (3, 1, vocab)).astype(DTYPES[dtype][1])
    trees = [random_tree(rng, rows, 0) for rows in logits]
    inputs = tree_inputs(rng, trees, logits, params)
    device.configure(1, 40, True)
    assert_equal(device.verify_tree(inputs, 512), host.verify_tree(inputs))
