"""What one pass of a trained drafter costs: a block, or one step."""

from __future__ import annotations

import time

import numpy as np

from dspark_runtime.backends.ort_graph import OrtGraphEngine
from dspark_runtime.backends.protocol import AnyArray, EngineOptions
from dspark_runtime.bundle.contract import ATTENTION_MASK, WRITE_INDICES
from dspark_runtime.bundle.draft_contract import BLOCK_POSITIONS
from dspark_runtime.bundle.files import BundleFiles
from dspark_runtime.bundle.manifest import DrafterEntry, GraphEntry
from dspark_runtime.speculation.kv_cache import round_up

_REPEATS = 9
_FEATURES = 2  # context rows new to the drafter in a typical round
_FLOATS = {"float32": np.float32, "float16": np.float16}


def measure_draft_ms(files: BundleFiles, drafter: DrafterEntry, options: EngineOptions, context: int) -> float:
    """Median milliseconds of a pass over a typical number of rows behind ``context`` slots of the drafter's cache."""
    graph = files.graph(drafter.graph_name, prefer=["onnxruntime-cpu"])
    engine = OrtGraphEngine(
        files.path(graph.file), name=graph.name, cache=graph.cache or (), dtype=graph.dtype, options=options
    )
    block = next((int(spec.shape[1]) for spec in graph.inputs if spec.name == BLOCK_POSITIONS), 0)
    new = _FEATURES if block else 1
    slots = context + new + block
    memory = engine.allocate(1, round_up(slots))
    runner = engine.open(memory)
    inputs = _inputs(graph, new, slots, context, engine.inputs)
    times = []
    for _ in range(_REPEATS + 1):
        started = time.perf_counter()
        runner.run(inputs)
        times.append((time.perf_counter() - started) * 1e3)
    return float(np.median(times[1:]))  # the first pass also allocates


def _inputs(graph: GraphEntry, new: int, slots: int, context: int, wanted: set[str]) -> dict[str, AnyArray]:
    sizes = {"batch": 1, "features": new, "tokens": new, "rows": 1, "kv_len": slots}
    inputs: dict[str, AnyArray] = {}
    for spec in graph.inputs:
        if spec.name in wanted:
            shape = [dim if isinstance(dim, int) else sizes[dim] for dim in spec.shape]
            kind = np.int64 if spec.dtype == "int64" else np.bool_ if spec.dtype == "bool" else _FLOATS[spec.dtype]
            inputs[spec.name] = np.zeros(shape, kind)
    inputs[ATTENTION_MASK][:] = True
    inputs[WRITE_INDICES][:] = context
    return inputs
