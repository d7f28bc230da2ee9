"""Measures what only running a finished build can tell: the cost of a pass, and how much its rows disturb each other.

The graphs run as the runtime will run them, from the files that will be shipped.
"""

from __future__ import annotations

import platform
import time
from dataclasses import dataclass, replace

import numpy as np

from dspark_export.build.row_noise import noise_between_batches, noise_text, row_noise
from dspark_runtime.arrays import AnyArray
from dspark_runtime.backends.opening import host_graph
from dspark_runtime.backends.ort import OrtEngine
from dspark_runtime.backends.ort_graph import OrtGraphEngine
from dspark_runtime.backends.protocol import FLOAT_PRODUCTS, EngineOptions
from dspark_runtime.bundle.contract import ATTENTION_MASK, WRITE_INDICES
from dspark_runtime.bundle.draft_contract import BLOCK_POSITIONS
from dspark_runtime.bundle.files import BundleFiles
from dspark_runtime.bundle.manifest import DrafterEntry, GraphEntry, RowNoise, StepCosts
from dspark_runtime.processors import default_threads, described_processors
from dspark_runtime.speculation.costs import MEASURED_ROWS, measure_pass_ms
from dspark_runtime.speculation.kv_cache import round_up

CONTEXT = 256
DRAFT_ROWS = 4
_REPEATS = 9
_FEATURES = 2  # context rows new to the drafter in a typical round
_FLOATS = {"float32": np.float32, "float16": np.float16}


@dataclass(frozen=True)
class Measurements:
    """What goes into the manifest. ``row_noise`` is None when the model has no room for the text."""

    costs: StepCosts
    row_noise: RowNoise | None


def measure(files: BundleFiles, threads: int | None = None) -> Measurements:
    """Run the graphs of a bundle on this machine's CPU. Raises BackendError if one of them cannot be run."""
    manifest = files.manifest
    precision = manifest.precision
    options = EngineOptions(threads=threads, accuracy_level=precision.accuracy_level or 0)
    room = manifest.model.max_positions
    context = min(CONTEXT, room // 2)
    rows = tuple(n for n in MEASURED_ROWS if context + n <= room)
    ms: dict[str, dict[str, float]] = {}
    noise = None
    for name in ("target", "self_draft"):
        if files.has_graph(name):
            counts = rows if name == "target" else tuple(n for n in rows if n <= DRAFT_ROWS)
            engine = _open(files, name, options)
            found = measure_pass_ms(engine, counts, context=context)
            ms[name] = {str(count): round(value, 4) for count, value in found.items()}
            if name == "target":
                noise = row_noise(engine, noise_text(files))
            del engine  # one graph in memory at a time
    if noise is not None:
        noise = noise.model_copy(update={"between_batches": _between_batches(files, noise, options)})
    for drafter in manifest.drafters:
        if drafter.trained:
            ms[drafter.graph_name] = {"1": round(_draft_ms(files, drafter, options, context), 4)}
    return Measurements(
        StepCosts(threads=threads or default_threads(), device=measured_device(), context=context, ms=ms), noise
    )


def _between_batches(files: BundleFiles, noise: RowNoise, options: EngineOptions) -> float | None:
    """With the arithmetic that an exact service uses."""
    precision = files.manifest.precision
    if precision.quantized and noise.without_single_rows:
        options = replace(options, accuracy_level=FLOAT_PRODUCTS)
    engine = _open(files, "target", options, batched=True)
    return noise_between_batches(engine, noise_text(files), files.manifest.model.max_positions)


def _open(files: BundleFiles, name: str, options: EngineOptions, batched: bool = False) -> OrtEngine:
    graph = host_graph(files, name, batched, options)
    return OrtEngine(
        files.path(graph.file),
        name=name,
        cache=files.manifest.model.cache,
        layers=graph.layers,
        dtype=graph.dtype,
        options=options,
    )


def _draft_ms(files: BundleFiles, drafter: DrafterEntry, options: EngineOptions, context: int) -> float:
    """Median milliseconds of a pass over a typical number of rows after ``context`` slots of the drafter's cache."""
    graph = host_graph(files, drafter.graph_name, options=options)
    engine = OrtGraphEngine(
        files.path(graph.file), name=graph.name, cache=graph.cache or (), dtype=graph.dtype, options=options
    )
    block = next((int(spec.shape[1]) for spec in graph.inputs if spec.name == BLOCK_POSITIONS), 0)
    new = _FEATURES if block else 1
    slots = context + new + block
    memory = engine.allocate(1, round_up(slots))
    runner = engine.open(memory)
    inputs = _zeros(graph, new, slots, context, engine.inputs)
    times = []
    for _ in range(_REPEATS + 1):
        started = time.perf_counter()
        runner.run(inputs)
        times.append((time.perf_counter() - started) * 1e3)
    return float(np.median(times[1:]))  # the first pass also allocates


def _zeros(graph: GraphEntry, new: int, slots: int, context: int, wanted: set[str]) -> dict[str, AnyArray]:
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


def measured_device() -> str:
    """The processor that passes are measured on, as the manifest names it."""
    names = [found["model name"] for found in described_processors() if "model name" in found]
    return names[0] if names else platform.processor() or platform.machine()
