"""How close the plugins' kernels come to the bandwidth of the GPU's memory.

    python benchmarks/plugin_kernels.py [--vocab 152064] [--rows 8] [--json]

Every kernel runs over enough copies of its inputs that none is still in the cache, captured in one CUDA graph so that
no launch waits for the host. The limit beside it is one read of the inputs at the bandwidth that a large copy has in
the same run. Needs a GPU, `pip install cuda-core[cu13]`, and `dspark.fatbin` in DSPARK_PLUGINS or plugins/build. The
table goes to stdout (``--json``: the same as JSON); exit code 8 without a GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, cast

import ml_dtypes
import numpy as np

from dspark_runtime.backends.cuda import CudaBindings
from dspark_runtime.backends.plugin_kernels import PluginKernels
from dspark_runtime.backends.plugin_launches import (
    DeviceTensor,
    Element,
    Launch,
    Tensors,
    cache_table,
    compact_cache,
    draft_block,
    draft_workspace,
    verify_tree,
    verify_workspace,
)
from dspark_runtime.errors import DsparkError

Array = np.ndarray[Any, Any]
REPEATS = 5
COPY = 1 << 29  # bytes of the large copy
SPREAD = 1 << 29  # bytes of inputs that copies are made up to


@dataclass(frozen=True)
class Row:
    """One kernel: microseconds of it, bytes it has to read, and the same bytes at the copy's bandwidth."""

    kernel: str
    microseconds: float
    megabytes: float
    gb_per_s: float
    limit_microseconds: float
    ratio: float


class Bench:
    """A GPU with its kernels, and the bandwidth of a copy."""

    def __init__(self, device: int) -> None:
        self.cuda, self.kernels = CudaBindings(device), PluginKernels(device)
        core: Any = self.kernels._core
        self.stream: Any = self.kernels.device.create_stream()
        timing = core.EventOptions(timing_enabled=True)
        self.events = [self.kernels.device.create_event(timing) for _ in range(2)]
        source, target = self.cuda.allocate(COPY), self.cuda.allocate(COPY)
        handle = int(self.stream.handle)
        seconds = self.timed(lambda: self.cuda.copy_rows((target, COPY), (source, COPY), COPY, 1, handle))
        self.bandwidth = 2 * COPY / seconds  # a copy reads and writes
        for memory in (source, target):
            self.cuda.free(memory)

    def timed(self, enqueue: Callable[[], None]) -> float:
        """Seconds of what ``enqueue`` puts on the stream: the least of some repetitions."""
        found: list[float] = []
        for _ in range(REPEATS):
            self.stream.record(self.events[0])
            enqueue()
            self.stream.record(self.events[1])
            self.events[1].sync()
            found.append((self.events[1] - self.events[0]) / 1000)
        return min(found)

    def put(self, arrays: dict[str, Array]) -> dict[str, DeviceTensor]:
        """Copies of ``arrays`` in device memory, until the process ends."""
        made: dict[str, DeviceTensor] = {}
        for name, array in arrays.items():
            address = self.cuda.allocate(array.nbytes)
            self.cuda.copy_in(address, np.ascontiguousarray(array).reshape(-1).view(np.uint8), int(self.stream.handle))
            made[name] = DeviceTensor(address, array.shape, cast(Element, array.dtype.name))
        self.stream.sync()
        return made

    def measure(self, kernel: str, read: int, make: Callable[[int], tuple[Launch, ...]]) -> Row:
        """``make(i)`` gives the launches for copy ``i`` of the inputs, which has ``read`` bytes."""
        copies = max(4, -(-SPREAD // read))
        launches = [launch for i in range(copies) for launch in make(i)]
        handle = int(self.stream.handle)
        self.kernels.run(launches, self.stream)  # loads kernels, which cannot be captured
        self.cuda.begin_capture(handle)
        self.kernels.run(launches, self.stream)
        graph = self.cuda.end_capture(handle)
        seconds = self.timed(lambda: self.cuda.launch(graph, handle)) / copies
        limit = read / self.bandwidth
        return Row(kernel, seconds * 1e6, read / 1e6, read / seconds / 1e9, limit * 1e6, seconds / limit)


def _verify(bench: Bench, vocab: int, rows: int, dtype: Any, temperature: float, top_k: int) -> Row:
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 2, (1, rows, vocab)).astype(dtype)
    copies = max(4, -(-SPREAD // logits.nbytes))
    tensors = [bench.put({"logits": logits}) for _ in range(copies)]
    ancestors = np.tril(np.ones((1, rows, rows), bool))  # a chain
    tokens = np.concatenate([[0], logits[0, :-1].astype(np.float32).argmax(-1)])[None].astype(np.int64)
    others: Tensors = bench.put(
        {
            "tokens": tokens,
            "ancestors": ancestors,
            "uniforms": rng.random((1, rows)).astype(np.float32),
            "temperature": np.array([temperature], np.float32),
            "top_k": np.array([top_k], np.int64),
            "top_p": np.array([1.0], np.float32),
            "min_p": np.array([0.0], np.float32),
        }
    )
    outputs = bench.put(
        {n: np.zeros((1, rows), np.int64) for n in ("path", "emitted")} | {"accepted": np.zeros(1, int)}
    )
    workspace = bench.put({"w": np.zeros(verify_workspace(1, rows) // 8, np.int64)})["w"].address
    how = "greedy" if temperature == 0 else f"temperature {temperature:g}" + (f", top-k {top_k}" if top_k else "")
    name = f"VerifyTree {rows} x {vocab} {np.dtype(dtype).name}, {how}"
    return bench.measure(
        name,
        logits.nbytes,
        lambda i: verify_tree({**tensors[i], **others}, outputs, workspace, bench.kernels.processors),
    )


def _draft(bench: Bench, vocab: int, rank: int, drafts: int) -> Row:
    rng = np.random.default_rng(2)
    half, hidden = np.float16, 1024
    weights = {
        "w1": rng.normal(size=(vocab, rank)).astype(half),
        "w2": rng.normal(size=(vocab, rank)).astype(half),
        "base_logits": rng.normal(0, 2, (1, drafts, vocab)).astype(half),
    }
    read = drafts * (weights["w2"].nbytes + weights["base_logits"].nbytes // drafts)
    copies = [bench.put(weights) for _ in range(max(4, -(-SPREAD // read)))]
    others = bench.put(
        {
            "hidden_rows": rng.normal(size=(1, drafts, hidden)).astype(half),
            "anchors": np.zeros(1, np.int64),
            "temperature": np.zeros(1, np.float32),
            "uniforms": rng.random((1, drafts)).astype(np.float32),
        }
    )
    outputs = bench.put({"tokens": np.zeros((1, drafts), np.int64), "probs": np.zeros((1, drafts, vocab), np.float32)})
    workspace = bench.put({"w": np.zeros(draft_workspace(1, drafts, rank) // 8, np.int64)})["w"].address
    name = f"DraftBlock vanilla, {drafts} slots, rank {rank}, {vocab}"
    processors = bench.kernels.processors
    return bench.measure(
        name, read, lambda i: draft_block("vanilla", {**copies[i], **others}, outputs, workspace, processors)
    )


def _compact(bench: Bench, layers: int, heads: int, width: int, rows: int) -> Row:
    capacity = 4096
    caches = bench.put({str(i): np.zeros((1, heads, capacity, width), np.float16) for i in range(2 * layers)})
    table = cache_table(tuple(caches.values()))
    address = bench.put({"t": np.frombuffer(table.data, np.int64)})["t"].address
    path = np.concatenate([[0], np.arange(2, rows + 1)])[None].astype(np.int64)  # every row moves by one
    moved, places = 2 * layers * heads * width * 2 * (rows - 1), range(0, capacity - 2 * rows, 2 * rows)
    inputs = [
        bench.put({"path": np.pad(path, ((0, 0), (0, 1)), constant_values=-1), "accepted": np.array([rows - 1]),
                   "starts": np.array([start])})
        for start in places
    ]  # fmt: skip
    name = f"CompactCache {2 * layers} tensors of {heads} x {width}, {rows - 1} rows"
    return bench.measure(name, 2 * moved, lambda i: compact_cache(table, address, inputs[i % len(inputs)]))


def main() -> int:
    """Measure and print; 0, or the exit code of the error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, default=152_064)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--device", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    try:
        bench = Bench(options.device)
        rows = [
            *(
                _verify(bench, options.vocab, options.rows, np.float16, t, k)
                for t, k in ((0.0, 0), (1.0, 0), (0.8, 50))
            ),
            _verify(bench, options.vocab, options.rows, ml_dtypes.bfloat16, 0.0, 0),
            _verify(bench, options.vocab, options.rows, np.float32, 0.0, 0),
            _draft(bench, options.vocab, 256, 5),
            _compact(bench, 32, 8, 128, options.rows),
        ]
    except DsparkError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    device = {"gpu": str(bench.kernels.device.name), "copy_gb_per_s": bench.bandwidth / 1e9}
    if options.json:
        print(json.dumps({**device, "kernels": [asdict(row) for row in rows]}))
        return 0
    print(f"{device['gpu']}, copy {bench.bandwidth / 1e9:.0f} GB/s")
    for row in rows:
        speed = f"{row.microseconds:8.1f} us  {row.gb_per_s:6.0f} GB/s"
        print(f"{row.kernel:<52} {speed}  limit {row.limit_microseconds:7.1f} us  {row.ratio:5.2f}x")
    return 0


if __name__ == "__main__":
    sys.exit(main())
