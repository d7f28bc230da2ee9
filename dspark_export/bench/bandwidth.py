"""The memory bandwidth of this machine, and the speed of plain decoding it allows."""

from __future__ import annotations

import threading
import time

import numpy as np

from dspark_runtime.bundle import BundleFiles

_BYTES = 256 << 20  # much larger than any cache
_REPEATS = 5


def read_bandwidth(threads: int) -> float:
    """Bytes per second that ``threads`` threads together read from memory, the best of several tries."""
    parts = [np.ones(_BYTES // threads // 4, np.float32) for _ in range(threads)]
    best = 0.0
    for _ in range(_REPEATS):
        workers = [threading.Thread(target=part.max) for part in parts]  # numpy releases the interpreter lock here
        started = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        best = max(best, sum(part.nbytes for part in parts) / (time.perf_counter() - started))
    return best


def bytes_per_token(files: BundleFiles) -> int:
    """Weight bytes one decoding step reads: all of the target's weights, the embedding table counted once if tied.

    An untied embedding table is counted although only a row of it is read, so that the limit errs on the low side.
    """
    graph = files.graph("target", prefer=["onnxruntime-cpu"])
    return sum(files.manifest.files[name].size for name in graph.data_files)
