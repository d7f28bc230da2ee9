"""What a finished build can only be asked by running it: the cost of a pass, and how much its rows disturb each other.

The graphs are run as the runtime will run them, from the files as they will be shipped.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from dspark_export.measure_drafts import measure_draft_ms
from dspark_runtime.backends.engine import Engine, EngineOptions
from dspark_runtime.backends.ort import OrtEngine
from dspark_runtime.bundle import BundleFiles, RowNoise, StepCosts
from dspark_runtime.costs import MEASURED_ROWS, measure_pass_ms
from dspark_runtime.kv_cache import round_up
from dspark_runtime.processors import default_threads, described_processors

CONTEXT = 256
DRAFT_ROWS = 4
NOISE_ROWS = (2, 3, 5, 8, 16)
NOISE_PREFIX = 16
_NOISE_TOKENS = 144

_TEXT = """A bicycle stays upright while it moves because small corrections never stop. When it leans to the left, the \
front wheel turns a little to the left as well, and the contact points of the wheels move back under the weight of the \
rider. def mean(values): return sum(values) / len(values). At 15 kilometres per hour the wheels turn about twice a \
second; at 30 they turn four times, and the same lean is corrected in half the time. A heavy load on the handlebar \
makes this slower. Question: a train leaves at 9:40 and arrives at 11:05. How long is the journey? Answer: from 9:40 \
to 10:40 is one hour, and from 10:40 to 11:05 are 25 minutes, so it takes 1 hour and 25 minutes."""


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
                noise = _row_noise(engine, noise_text(files))
            del engine  # one graph in memory at a time
    for drafter in manifest.drafters:
        if drafter.kind in ("block", "eagle3", "draft_model"):
            ms[drafter.graph or drafter.name] = {"1": round(measure_draft_ms(files, drafter, options, context), 4)}
    return Measurements(
        StepCosts(threads=threads or default_threads(), device=_device(), context=context, ms=ms), noise
    )


def _open(files: BundleFiles, name: str, options: EngineOptions) -> OrtEngine:
    graph = files.graph(name, prefer=["onnxruntime-cpu"])
    return OrtEngine(
        files.path(graph.file),
        name=name,
        cache=files.manifest.model.cache,
        layers=graph.layers,
        dtype=graph.dtype,
        options=options,
    )


def row_logits(engine: Engine, ids: Sequence[int], prefix: int, rows: int) -> np.ndarray:
    """Logits [len(ids) - prefix, vocab] of a text run as one pass over ``prefix`` tokens, then ``rows`` at a time."""
    memory = engine.allocate(1, round_up(len(ids)))
    runner = engine.open(memory)
    runner.select(0, 1)
    collected = []
    start = 0
    while start < len(ids):
        count = prefix if start == 0 else min(rows, len(ids) - start)
        buffers = runner.prepare(count, count, start + count)
        buffers.input_ids[0] = ids[start : start + count]
        buffers.position_ids[0] = np.arange(start, start + count)
        buffers.logit_rows[0] = np.arange(count)
        buffers.write_indices[0] = start
        buffers.attention_mask[0, 0] = np.tri(count, start + count, start, dtype=np.bool_)
        runner.run()
        if start:
            collected.append(buffers.logits[0].copy())
        start += count
    return np.concatenate(collected)


def _row_noise(engine: Engine, ids: Sequence[int]) -> RowNoise | None:
    body = len(ids) - NOISE_PREFIX
    usable = tuple(n for n in NOISE_ROWS if n <= body)
    if len(usable) < 2:
        return None
    single = row_logits(engine, ids, NOISE_PREFIX, 1)
    several = {}
    for count in usable:
        # A last chunk of one row would be a single-row pass again: cut the text to whole chunks.
        whole = body // count * count
        several[count] = row_logits(engine, ids[: NOISE_PREFIX + whole], NOISE_PREFIX, count)
    reference = several[usable[0]]
    return RowNoise(
        max_abs_logit_diff=max(_difference(single, logits) for logits in several.values()),
        without_single_rows=max(_difference(reference, logits) for logits in several.values()),
        rows=usable,
        positions=body,
    )


def _difference(left: np.ndarray, right: np.ndarray) -> float:
    shared = min(len(left), len(right))
    return float(np.abs(left[:shared] - right[:shared]).max())


def noise_text(files: BundleFiles) -> list[int]:
    """The token ids row noise is measured on: real words, or, without a tokenizer, arbitrary ids."""
    model = files.manifest.model
    vocab_size, room = model.vocab_size, model.max_positions
    path = files.tokenizer_dir / "tokenizer.json"
    if path.is_file():
        ids = Tokenizer.from_file(str(path)).encode(_TEXT).ids
    else:
        ids = [int(i) for i in np.random.default_rng(0).integers(0, vocab_size, _NOISE_TOKENS)]
    return [i for i in ids if i < vocab_size][: min(_NOISE_TOKENS, room)]


def _device() -> str:
    names = [found["model name"] for found in described_processors() if "model name" in found]
    return names[0] if names else platform.processor() or platform.machine()
