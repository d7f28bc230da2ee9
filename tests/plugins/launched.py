"""Checks of the runtime's own launches, on any device that carries them out: equal to the host build, bit for bit."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol, cast

import numpy as np

from dspark_runtime.backends.plugin_launches import (
    DeviceTensor,
    Element,
    Launch,
    Markov,
    cache_table,
    compact_cache,
    draft_block,
    draft_workspace,
    verify_chain,
    verify_tree,
    verify_workspace,
)
from tests.plugins.conftest import compile_host
from tests.plugins.draft_cases import draft_case
from tests.plugins.host_library import DTYPES, Array, HostLibrary
from tests.plugins.test_host_verify import chain_inputs, random_params, random_tree, tree_inputs


class Device(Protocol):
    """Memory and kernels."""

    def tensors(self, arrays: Mapping[str, Array]) -> dict[str, DeviceTensor]:
        """``arrays`` in the device's memory, until :meth:`run` has brought them back."""

    def run(self, launches: Iterable[Launch]) -> None:
        """Carry out ``launches``, then bring all tensors back into their arrays."""


class Imitated:
    """The imitated device, whose memory is the host's."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        for name in ("verify_workspace", "draft_workspace", "cache_table"):
            getattr(self.library, f"emulation_{name}").restype = ctypes.c_int64

    def tensors(self, arrays: Mapping[str, Array]) -> dict[str, DeviceTensor]:
        return {n: DeviceTensor(a.ctypes.data, a.shape, cast(Element, a.dtype.name)) for n, a in arrays.items()}

    def run(self, launches: Iterable[Launch]) -> None:
        for launch in launches:
            values = [np.array([a], np.uint64 if isinstance(a, int) else np.int32) for a in launch.arguments]
            pointers = (ctypes.c_void_p * len(values))(*(value.ctypes.data for value in values))
            grid = (ctypes.c_uint32 * 3)(*launch.grid)
            name = launch.kernel.encode()
            assert self.library.emulation_launch(name, grid, ctypes.c_uint32(launch.threads), pointers) == 0, name

    @classmethod
    def make(cls, folder: Path) -> Imitated:
        """Compile it; the test is skipped where there is no g++."""
        options = ("-O2", "-shared", "-fPIC", "-DDSPARK_EMULATED")
        source = "../tests/plugins/emulation/library.cpp"
        return cls(compile_host(folder / "libemulated.so", *options, sources=(source,)))


def verdicts(batch: int, rows: int) -> dict[str, Array]:
    return {
        "path": np.full((batch, rows), -7, np.int64),
        "emitted": np.full((batch, rows), -7, np.int64),
        "accepted": np.full(batch, -7, np.int64),
    }


def assert_equal(found: Iterable[Array], expected: Iterable[Array]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert np.array_equal(a, b, equal_nan=a.dtype.kind == "f")


def check_verification(
    device: Device, host: HostLibrary, dtype: str, family: str, processors: int, vocab: int, rows: int, batch: int
) -> None:
    """A pass with each way of verifying, the one with a workspace twice."""
    rng = np.random.default_rng(21)
    logits = rng.normal(0, 2, (batch, rows, vocab)).astype(DTYPES[dtype][1])
    params = [random_params(rng) for _ in range(batch)]
    if family == "tree":
        trees = [random_tree(rng, logits[i, : rng.integers(1, rows + 1)], 0.9) for i in range(batch)]
        inputs, function, expected = tree_inputs(rng, trees, logits, params), verify_tree, host.verify_tree
    else:
        inputs, function, expected = chain_inputs(rng, logits, params), verify_chain, host.verify_chain
    verdict = expected(inputs)
    for workspace in (verify_workspace(batch, rows), 0):
        memory, found = {"workspace": np.zeros(workspace, np.uint8)}, verdicts(batch, rows)
        for _ in range(2):  # it is left as it was found
            address = device.tensors(memory)["workspace"].address if workspace else 0
            device.run(function(device.tensors(inputs), device.tensors(found), address, processors))
            assert_equal(found.values(), verdict)
            assert not memory["workspace"].any()


def check_drafting(device: Device, host: HostLibrary, kind: Markov, processors: int) -> None:
    """Blocks of every type, with and without confidences and a map, one of them for many sequences."""
    rng = np.random.default_rng(22)
    for i, dtype in enumerate([*DTYPES, *DTYPES]):
        case = draft_case(rng, kind, dtype, mapped=i % 2 == 1, confident=("none", "hidden", "token")[i % 3])
        if i == 4:  # more sequences than one block takes
            names = ("base_logits", "hidden_rows", "anchors", "temperature", "uniforms")
            case |= {name: np.ascontiguousarray(np.concatenate([case[name]] * 11)[:11]) for name in names}
        batch, drafts, vocab = case["base_logits"].shape
        rank = case["w1"].shape[1] if "w1" in case else 0
        found = {
            "tokens": np.full((batch, drafts), -7, np.int64),
            "probs": np.full((batch, drafts, vocab), np.nan, np.float32),
        }
        if "confidence" in case:
            found["confidences"] = np.full((batch, drafts), np.nan, np.float32)
        memory = {"workspace": np.full(draft_workspace(batch, drafts, rank), 0x7F, np.uint8)}
        address = device.tensors(memory)["workspace"].address
        device.run(draft_block(kind, device.tensors(case), device.tensors(found), address, processors))
        assert_equal(found.values(), host.draft_block(kind, case)[: len(found)])


def check_compaction(device: Device, host: HostLibrary, width: int) -> int:
    """Rows that move over each other; returns the bytes of the table in device memory."""
    rng = np.random.default_rng(23)
    batch, capacity = 2, 20
    caches = {str(i): rng.normal(size=(batch, n, capacity, width)).astype(np.float16) for i, n in enumerate((1, 4, 2))}
    path = np.array([[0, 2, 3, 7, 8, 11, *[-1] * 6], [0, 1, 2, 3, 4, 9, 10, *[-1] * 5]])
    inputs = {"path": path, "accepted": np.array([5, 6]), "starts": np.array([8, 3])}
    expected = [cache.copy() for cache in caches.values()]
    host.compact_cache(expected, path, inputs["accepted"], inputs["starts"])
    table = cache_table(tuple(device.tensors(caches).values()))
    memory = {"table": np.frombuffer(bytearray(table.data), np.uint8)}
    device.run(compact_cache(table, device.tensors(memory)["table"].address, device.tensors(inputs)))
    assert_equal(caches.values(), expected)
    alone = {"path": path[:, :1].copy(), "accepted": inputs["accepted"], "starts": inputs["starts"]}
    assert compact_cache(table, 0, device.tensors(alone)) == ()  # nothing moves
    return len(table.data)
