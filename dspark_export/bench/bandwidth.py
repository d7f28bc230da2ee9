"""The memory bandwidth of this machine, and the speed of plain decoding it allows.

Decoding one token reads every weight once. A model larger than the caches can therefore not decode faster than
bandwidth over weight bytes, whatever the kernels; how close plain decoding comes to that limit says how good they are.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import onnx

from dspark_runtime.backends.opening import host_graph
from dspark_runtime.bundle.files import BundleFiles

_BYTES = 192 << 20  # of each array: much larger than any cache
_CHUNK = 8192  # elements of a triad step; its temporary stays in the first-level cache
_REPEATS = 4


@dataclass(frozen=True)
class Bandwidth:
    """Bytes per second, the best of several tries. ``triad`` (a = b + s * c) counts two reads and one write."""

    read: float
    triad: float


def measure_bandwidth(threads: int) -> Bandwidth:
    """Let ``threads`` threads together stream through arrays much larger than the caches."""
    size = _BYTES // threads // 4 // _CHUNK * _CHUNK
    sources = [np.ones(size, np.float32) for _ in range(threads)]
    read = _fastest([source.max for source in sources])  # numpy releases the interpreter lock in both
    triads = [_triad(source, np.ones(size // 2, np.float32)) for source in sources]
    return Bandwidth(threads * size * 4 / read, threads * 3 * (size // 2) * 4 / _fastest(triads))


def _triad(memory: np.ndarray, out: np.ndarray) -> Callable[[], None]:
    """The halves of ``memory`` are b and c."""
    half = len(out)
    b, c, temporary = memory[:half], memory[half:], np.empty(_CHUNK, np.float32)

    def work() -> None:
        for start in range(0, half, _CHUNK):
            end = min(start + _CHUNK, half)
            part = np.multiply(c[start:end], np.float32(3), out=temporary[: end - start])
            np.add(b[start:end], part, out=out[start:end])

    return work


def _fastest(jobs: Sequence[Callable[[], Any]]) -> float:
    best = float("inf")
    for _ in range(_REPEATS):
        workers = [threading.Thread(target=job) for job in jobs]
        started = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        best = min(best, time.perf_counter() - started)
    return best


def bytes_per_token(files: BundleFiles) -> int:
    """Weight bytes one plain decoding step reads: all initializers of the target graph, except tables that are only
    looked up (of an untied embedding one row is read). The growing cache is not counted."""
    graph = host_graph(files, "target")
    model = onnx.load(files.path(graph.file), load_external_data=False)
    users: dict[str, set[str]] = defaultdict(set)
    for node in model.graph.node:
        for name in node.input:
            users[name].add(node.op_type)
    looked_up = {name for name, kinds in users.items() if all(kind.startswith(("Gather", "Lookup")) for kind in kinds)}
    return sum(_size(tensor) for tensor in model.graph.initializer if tensor.name not in looked_up)


def _size(tensor: onnx.TensorProto) -> int:
    for entry in tensor.external_data:
        if entry.key == "length":
            return int(entry.value)
    return len(tensor.raw_data) or prod(tensor.dims) * 4
