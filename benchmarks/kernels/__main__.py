"""Sequence kernels beside the machine's limit and ONNX Runtime's own operators, by rows and threads.

    python -m benchmarks.kernels --library libdspark_cpu.so [--rows 1,2,4,8] [--threads 1,2] [--only int4] [--json]
                                 [--plot FILE]

A product is measured over a chain of square matrices that together do not fit a cache; attention over the keys and
values of many layers. The limit is one read of the weights (keys and values) at the speed at which this process sums a
large array. Both sides alternate in one process; each figure is a median. On a machine with other work only the
ratios mean anything.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnxruntime as ort
from onnx import NodeProto, TensorProto, helper, numpy_helper

Array = np.ndarray[Any, Any]
Node = tuple[NodeProto, dict[str, Array]]

WIDTH = 1024  # of the square matrices
BLOCK = 32
SPREAD = 96 << 20  # bytes of weights in a chain
CONTEXT = 2048
HEADS, KV_HEADS, HEAD = 9, 3, 64


@dataclass(frozen=True)
class Row:
    """Milliseconds of a pass over ``megabytes``, ONNX Runtime's where it has the operator, and the limit."""

    operator: str
    threads: int
    rows: int
    megabytes: float
    milliseconds: float
    onnxruntime: float | None
    limit: float
    to_one_row: float


def packed(rng: np.random.Generator, name: str) -> tuple[str, dict[str, Array]]:
    """Operator and weight inputs of one matrix [WIDTH, WIDTH] of unit gain."""
    tiles, blocks, gain = WIDTH // 16, WIDTH // BLOCK, WIDTH**-0.5

    def integers(*shape: int) -> Array:
        return rng.integers(0, 256, (tiles, *shape), dtype=np.uint8)

    def scales(*shape: int, spread: float) -> Array:
        return np.full((tiles, *shape), gain / spread, np.float32)

    if name in ("int4", "int8"):
        groups, spread = (BLOCK // 8, 4.6) if name == "int4" else (BLOCK // 4, 74)
        inputs = {"weight": integers(blocks, groups, 16, 4), "scale": scales(blocks, 16, spread=spread)}
        return f"Product{name.capitalize()}", inputs
    if name == "w8a8":
        return "ProductW8A8", {"weight": integers(WIDTH // 4, 16, 4), "scale": scales(16, spread=74)}
    floats = (rng.standard_normal((tiles, WIDTH, 16), np.float32) * gain).astype(np.float32)
    if name == "bf16":
        pairs = floats.reshape(tiles, WIDTH // 2, 16, 2)
        return "ProductBFloat16", {"weight": pairs.astype(ml_dtypes.bfloat16)}
    return (
        ("ProductFloat16", {"weight": floats.astype(np.float16)})
        if name == "fp16"
        else (
            "ProductFloat32",
            {"weight": floats},
        )
    )


def ours(rng: np.random.Generator, name: str, x: str, y: str) -> Node:
    operator, inputs = packed(rng, name)
    named = {f"{y}.{key}": value for key, value in inputs.items()}
    return helper.make_node(operator, [x, *named], [y], domain="dspark", N=WIDTH), named


def theirs(rng: np.random.Generator, name: str, x: str, y: str) -> Node:
    if name == "fp32":
        weight = (rng.standard_normal((WIDTH, WIDTH)) * WIDTH**-0.5).astype(np.float32)
        return helper.make_node("MatMul", [x, f"{y}.w"], [y]), {f"{y}.w": weight}
    bits = int(name[3:])
    spread = 4.6 if bits == 4 else 74
    named: dict[str, Array] = {
        f"{y}.w": rng.integers(0, 256, (WIDTH, WIDTH // BLOCK, BLOCK * bits // 8), dtype=np.uint8),
        f"{y}.s": np.full(WIDTH * WIDTH // BLOCK, WIDTH**-0.5 / spread, np.float32),
    }
    settings: dict[str, Any] = {"K": WIDTH, "N": WIDTH, "bits": bits, "block_size": BLOCK, "accuracy_level": 4}
    return helper.make_node("MatMulNBits", [x, *named], [y], domain="com.microsoft", **settings), named


def chain(make: Callable[[str, str], Node], library: Path, threads: int) -> tuple[Callable[[Array], None], int]:
    """A session over as many matrices as SPREAD asks for, ready to run, and their bytes."""
    nodes: list[NodeProto] = []
    constants, size, x = [], 0, "x"
    while size < SPREAD:
        node, inputs = make(x, f"y{len(nodes)}")
        nodes.append(node)
        constants += [numpy_helper.from_array(a, key) for key, a in inputs.items()]
        size += sum(a.nbytes for a in inputs.values())
        x = node.output[0]
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", WIDTH])],
        [helper.make_tensor_value_info(x, TensorProto.FLOAT, None)],
        constants,
    )
    session = open_session(graph, library, threads)
    return lambda array: session.run(None, {"x": array}), size


def open_session(graph: Any, library: Path, threads: int) -> ort.InferenceSession:
    domains = [helper.make_opsetid("", 24), helper.make_opsetid("dspark", 1), helper.make_opsetid("com.microsoft", 1)]
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, threads
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.register_custom_ops_library(str(library))
    model = helper.make_model(graph, opset_imports=domains, ir_version=11)
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def attention(library: Path, threads: int) -> tuple[Callable[[int], None], int]:
    """Attention over CONTEXT keys in place, a cache for each of many layers, and the bytes of these caches."""
    capacity = CONTEXT + 64
    cache = (1, KV_HEADS, capacity, HEAD)
    layer = 2 * 4 * KV_HEADS * CONTEXT * HEAD
    layers = SPREAD // layer
    columns = (HEADS + 2 * KV_HEADS) * HEAD
    names = ["x", "past_key", "past_value", "mask", "start", "positions"]
    types = [TensorProto.FLOAT] * 3 + [TensorProto.BOOL] + [TensorProto.INT64] * 2
    shapes: list[list[Any]] = [[1, "rows", columns], list(cache), list(cache), [1, 1, "rows", "kv"], [1], [1, "rows"]]
    offsets: dict[str, Any] = {"key_offset": HEADS * HEAD, "value_offset": (HEADS + KV_HEADS) * HEAD}
    node = helper.make_node(
        *("SequenceAttention", ["x", "x", "x", *names[1:]], ["y", "k", "v"]),
        domain="dspark",
        heads=HEADS,
        scale=HEAD**-0.5,
        **offsets,
    )
    inputs = [helper.make_tensor_value_info(*each) for each in zip(names, types, shapes, strict=True)]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("y", "k", "v")]
    session = open_session(helper.make_graph([node], "attention", inputs, outputs), library, threads)
    rng = np.random.default_rng(0)
    caches = [
        [ort.OrtValue.ortvalue_from_numpy(rng.standard_normal(cache, np.float32)) for _ in "kv"] for _ in range(layers)
    ]

    def run(rows: int) -> None:
        mask = np.ones((1, 1, rows, CONTEXT + rows), bool)
        mask[0, 0, :, CONTEXT:] = np.tri(rows)
        given = {
            "x": rng.standard_normal((1, rows, columns), np.float32),
            "mask": mask,
            "start": np.array([CONTEXT]),
            "positions": np.arange(CONTEXT, CONTEXT + rows)[None],
        }
        for key, value in caches:
            binding = session.io_binding()
            for name, array in given.items():
                binding.bind_cpu_input(name, array)
            binding.bind_output("y")
            for name, past, tensor in (("k", "past_key", key), ("v", "past_value", value)):
                binding.bind_ortvalue_input(past, tensor)
                binding.bind_ortvalue_output(name, tensor)
            session.run_with_iobinding(binding)

    return run, layers * layer


def read_speed(threads: int) -> float:
    """Bytes a second at which ``threads`` sum a large array."""
    parts = np.array_split(np.ones(SPREAD // 4, np.int64), threads)
    with ThreadPoolExecutor(threads) as pool:
        seconds = [timed(lambda: list(pool.map(np.sum, parts))) for _ in range(7)]
    return sum(part.nbytes for part in parts) / min(seconds)


def timed(f: Callable[[], Any]) -> float:
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def in_turns(runs: Sequence[Callable[[], Any]], repeats: int) -> list[float]:
    """Median seconds of each, one after another in every round."""
    seconds = [[timed(run) for run in runs] for _ in range(repeats + 1)][1:]
    return [statistics.median(column) for column in zip(*seconds, strict=True)]


def measure(name: str, options: argparse.Namespace, threads: int, speed: float) -> list[Row]:
    rng, measured = np.random.default_rng(0), []
    if name == "attention":
        run, size = attention(options.library, threads)
        runs = [[lambda rows=rows: run(rows)] for rows in options.rows]
    else:
        mine, size = chain(lambda x, y: ours(rng, name, x, y), options.library, threads)
        both = [mine]
        if name in ("int4", "int8", "fp32"):
            both.append(chain(lambda x, y: theirs(rng, name, x, y), options.library, threads)[0])
        inputs = [rng.standard_normal((rows, WIDTH), np.float32) for rows in options.rows]
        runs = [[lambda f=f, x=x: f(x) for f in both] for x in inputs]  # type: ignore[misc]
    one = 0.0
    for rows, each in zip(options.rows, runs, strict=True):
        seconds, *other = in_turns(each, options.repeats)
        one = one or seconds
        ort_ms = other[0] * 1e3 if other else None
        measured.append(Row(name, threads, rows, size / 1e6, seconds * 1e3, ort_ms, size / speed * 1e3, seconds / one))
    return measured


def plot(measured: list[Row], path: Path) -> None:
    """Milliseconds by rows, one panel for each operator, at the most threads."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    mine = [row for row in measured if row.threads == max(r.threads for r in measured)]
    names = list(dict.fromkeys(row.operator for row in mine))
    figure, panels = pyplot.subplots(1, len(names), figsize=(3.2 * len(names), 3.2), squeeze=False)
    for panel, name in zip(panels[0], names, strict=True):
        rows = [row for row in mine if row.operator == name]
        x = [row.rows for row in rows]
        panel.plot(x, [row.milliseconds for row in rows], "o-", label="sequence kernels")
        if rows[0].onnxruntime is not None:
            panel.plot(x, [row.onnxruntime for row in rows], "s--", label="ONNX Runtime")
        panel.axhline(rows[0].limit, color="0.6", label="one read of the data")
        panel.set(title=name, xlabel="rows", xscale="log", ylim=(0, None))
        panel.set_xticks(x, [str(value) for value in x], minor=False)
    panels[0][0].set_ylabel("milliseconds")
    panels[0][0].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path)


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> int:
    names = ("int4", "int8", "w8a8", "bf16", "fp16", "fp32", "attention")
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--library", type=Path, required=True, help="the built libdspark_cpu.so")
    parser.add_argument(
        "--rows", type=numbers, default=[1, 2, 4, 8, 16, 32], help="rows of a pass, separated by commas"
    )
    parser.add_argument("--threads", type=numbers, default=[os.cpu_count() or 1], help="threads, separated by commas")
    parser.add_argument("--only", choices=names, action="append", help="measure this operator alone; may be repeated")
    parser.add_argument("--repeats", type=int, default=7, help="rounds whose median counts")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--plot", type=Path, help="draw the figures into this file")
    options = parser.parse_args()
    measured: list[Row] = []
    for threads in options.threads:
        speed = read_speed(threads)
        if not options.json:
            print(f"\n{threads} threads, reading {speed / 1e9:.1f} GB/s")
            print("operator   rows     ms  /one row   limit  of limit  ONNX Runtime")
        for name in options.only or names:
            measured += measure(name, options, threads, speed)
            for row in measured[-len(options.rows) :] if not options.json else []:
                beside = "" if row.onnxruntime is None else f"{row.onnxruntime:10.2f}"
                print(
                    f"{name:9} {row.rows:5} {row.milliseconds:7.2f} {row.to_one_row:8.2f} {row.limit:8.2f}"
                    f" {row.limit / row.milliseconds:8.0%} {beside}",
                    flush=True,
                )
    if options.json:
        print(json.dumps([asdict(row) for row in measured], indent=1))
    if options.plot:
        plot(measured, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
