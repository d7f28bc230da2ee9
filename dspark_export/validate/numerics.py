"""Are the graphs the model? Every decoder on real passes, compared by Polygraphy with PyTorch and a fresh export."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from polygraphy.comparator import Comparator
from polygraphy.json import save_json
from polygraphy.logger import G_LOGGER

from dspark_export.build.row_noise import distances
from dspark_export.validate.activations import Pass, inputs_of, record
from dspark_export.validate.bisect import Culprit, first_difference
from dspark_export.validate.checks import Check
from dspark_export.validate.references import GraphRunner, ModelRunner
from dspark_export.validate.tolerances import (
    AGAINST_MODEL,
    BETWEEN_FORMS,
    ROUNDED,
    largest_relative,
    relative_rms,
)
from dspark_runtime.arrays import AnyArray
from dspark_runtime.backends.opening import host_graph
from dspark_runtime.backends.protocol import FLOAT_PRODUCTS
from dspark_runtime.bundle.contract import LOGITS, PAST
from dspark_runtime.bundle.files import BundleFiles
from dspark_runtime.bundle.manifest import GraphEntry

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from dspark_export.validate.rebuild import Rebuilt

_TYPES = {"float32": np.float32, "float16": np.float16}
Measure = Callable[[AnyArray, AnyArray], float]


@dataclass(frozen=True)
class Worst:
    """Where two runners differ most."""

    measured: float
    output: str
    one: Pass
    by_pass: dict[str, float]


@dataclass(frozen=True)
class GraphCheck:
    """Checks the decoders of a bundle on ``texts``.

    ``model``: the PyTorch model in float32; None: graphs are compared with their standard form, run without
    optimizations. ``rebuilt``: clean graphs, to compare quantized ones with and to find a wrong node by; None: neither.
    ``keep``: folder for the inputs of failing passes.
    """

    files: BundleFiles
    texts: Sequence[Sequence[int]]
    threads: int | None
    model: PreTrainedModel | None
    rebuilt: Rebuilt | None
    keep: Path

    def run(self) -> Iterator[Check]:
        """One or two checks of every form that runs on this CPU."""
        for graph in self.files.manifest.graphs:
            if graph.name not in ("target", "self_draft") or graph.dtype != "float32":
                continue
            if graph.variant == "onnxruntime-cpu-batch":
                continue  # the same graph as the standard one, in float32; robustness runs it
            if self.model is not None:
                yield self.against_model(graph)
            elif graph.variant != "standard" and self._standard(graph).dtype == "float32":
                yield self.against_standard(graph)

    def against_model(self, graph: GraphEntry) -> Check:
        """``graph`` against PyTorch."""
        assert self.model is not None
        model, layers = self.model, graph.layers or range(self.files.manifest.model.num_layers)
        name = f"{graph.name}.{graph.variant}"
        return self.against(graph, lambda passes: ModelRunner(model, passes, layers, graph.taps), name)

    def against(self, graph: GraphEntry, reference: Callable[[Sequence[Pass]], Any], name: str | None = None) -> Check:
        """``graph`` against any runner of the same passes, called PyTorch."""
        return self._check(graph, "PyTorch", name or graph.name, AGAINST_MODEL, reference)

    def against_standard(self, graph: GraphEntry) -> Check:
        """A form of a graph against its standard form."""
        path = self.files.path(self._standard(graph).file)
        return self._check(
            graph,
            "its standard form",
            f"{graph.name}.{graph.variant}",
            BETWEEN_FORMS,
            lambda _: GraphRunner(path, "onnxruntime (standard)", self.threads, optimized=False),
        )

    def _standard(self, graph: GraphEntry) -> GraphEntry:
        return self.files.graph(graph.name)

    def _check(
        self, graph: GraphEntry, against: str, name: str, limit: float, reference: Callable[[Sequence[Pass]], Any]
    ) -> Check:
        began = time.perf_counter()
        path, shapes = self.files.path(graph.file), cache_shapes(graph)
        precision = self.files.manifest.precision
        # Products of quantized weights in float32: rounded activations would hide what is looked for.
        level = FLOAT_PRODUCTS if precision.quantized else 0
        rounded = precision.integer_products and graph.variant != "standard"  # and there they cannot be avoided
        limit, distance = (ROUNDED, relative_rms) if rounded else (limit, largest_relative)
        worst: Worst | None = None
        for number, ids in enumerate(self.texts):
            tested = GraphRunner(path, f"onnxruntime ({graph.variant})", self.threads, level=level)
            with quiet(), tested:
                passes = record(tested.whole, ids, shapes, seed=number)
            found = compare(tested, reference(passes), passes, distance)
            if worst is None or found.measured > worst.measured:
                worst = found
        assert worst is not None
        passed = worst.measured <= limit
        where, message = ("", "") if passed else self._explain(graph, worst, limit)
        return Check(
            id=f"numerics.{name}",
            family="numerics",
            title=f"{graph.name} ({graph.variant}) against {against}",
            status="passed" if passed else "failed",
            measured=worst.measured if np.isfinite(worst.measured) else None,
            limit=limit,
            unit="root mean square, relative" if rounded else "of the largest magnitude",
            where=where,
            message=message,
            seconds=time.perf_counter() - began,
            data={"passes": {k: v if np.isfinite(v) else None for k, v in worst.by_pass.items()}},
        )

    def _explain(self, graph: GraphEntry, worst: Worst, limit: float) -> tuple[str, str]:
        path = self.files.path(graph.file)
        command = save_inputs(self.keep / f"{graph.name}.{graph.variant}", path, worst.one)
        culprit: Culprit | None = None
        if self.rebuilt is not None:
            clean = self.rebuilt.graph(graph)
            culprit = first_difference(path, clean, worst.one.feeds, limit, self.threads)
        advice = (
            "Give the model with --model to find the first node that is wrong."
            if self.rebuilt is None
            else "No node that a fresh export has too differs from it: nodes were added, or the export itself is wrong."
            if culprit is None
            else f"The first node that differs from a fresh export is {culprit.node} ({culprit.operator}), of "
            f"{culprit.scope}: {culprit.value} is {culprit.measured:.2g} off."
        )
        where = worst.output if culprit is None else str(culprit)
        return where, f"{worst.output} is off in the {worst.one.name}. {advice} Its inputs are kept: {command}"


def quiet() -> AbstractContextManager[None]:
    """Polygraphy tells of errors only: what it finds is in the report."""
    silenced: AbstractContextManager[None] = G_LOGGER.verbosity(G_LOGGER.ERROR)
    return silenced


def cache_shapes(graph: GraphEntry) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Shape, with 0 for the capacity, and type of every past tensor of one sequence."""
    found = {}
    for spec in graph.inputs:
        if spec.name.startswith(PAST):
            shape = tuple(1 if d == "batch" else 0 if d == "capacity" else int(d) for d in spec.shape)
            found[spec.name] = (shape, _TYPES[spec.dtype])
    return found


def compare(tested: GraphRunner, reference: Any, passes: Sequence[Pass], distance: Measure) -> Worst:
    """Run both on all passes and find where they differ most; among equals, logits."""
    measured: dict[tuple[int, str], float] = {}
    place = 0

    def judge(mine: Any, theirs: Any) -> dict[str, bool]:
        nonlocal place
        shared = [name for name in mine if name in theirs]
        for name in shared:
            measured[place, name] = distance(mine[name], theirs[name])
        place += 1
        return {name: True for name in shared}  # the verdict is on the worst of all, not on each

    with quiet():
        results = Comparator.run([tested, reference], data_loader=[one.feeds for one in passes])
        Comparator.compare_accuracy(results, compare_func=judge)
    (at, output), value = max(measured.items(), key=lambda item: (item[1], item[0][1] == LOGITS))
    by_pass = {one.name: max(v for (p, _), v in measured.items() if p == i) for i, one in enumerate(passes)}
    return Worst(value, output, passes[at], by_pass)


def save_inputs(folder: Path, graph: Path, one: Pass) -> str:
    """Keep the inputs of a pass as Polygraphy reads them; returns the command that runs the graph on them."""
    folder.mkdir(parents=True, exist_ok=True)
    with quiet():
        save_json([dict(one.feeds)], str(folder / "inputs.json"))
    told = {"name": one.name, "history": one.history, "tokens": one.tokens, "parents": one.parents}
    (folder / "pass.json").write_text(json.dumps(told), "utf-8")
    return f"polygraphy run {graph} --onnxrt --load-inputs {folder / 'inputs.json'} --save-outputs outputs.json"


def check_quantization(
    files: BundleFiles, model: PreTrainedModel, texts: Sequence[Sequence[int]], threads: int | None
) -> Check:
    """What quantization costs: the graph in production against the model as it was. There is no limit for that."""
    began = time.perf_counter()
    graph = host_graph(files, "target")
    level = files.manifest.precision.accuracy_level or 0
    found, wanted = [], []
    for ids in texts:
        one = inputs_of(0, ids, range(-1, len(ids) - 1), zero_caches(graph, len(ids)))
        running = GraphRunner(files.path(graph.file), "production", threads, level=level)
        with quiet(), running:
            found.append(running.whole(one)[LOGITS][0])
        plain = ModelRunner(model, [], range(files.manifest.model.num_layers))
        wanted.append(plain.logits(ids))
    mine, theirs = np.concatenate(found), np.concatenate(wanted)
    divergence, same = (float(x) for x in distances(theirs, mine).mean(0))
    return Check(
        id="numerics.quantization",
        family="numerics",
        title="What quantization costs",
        status="passed",
        measured=relative_rms(mine, theirs),
        unit="root mean square of logits, relative",
        message=f"The most likely token is the model's at {same:.1%} of {len(mine)} positions; the distributions are "
        f"{divergence:.3f} nats apart (KL).",
        seconds=time.perf_counter() - began,
        data={"same_token": same, "kl": divergence},
    )


def zero_caches(graph: GraphEntry, capacity: int) -> dict[str, AnyArray]:
    """Empty caches of ``capacity`` slots."""
    return {
        name: np.zeros([capacity if size == 0 else size for size in shape], kind)
        for name, (shape, kind) in cache_shapes(graph).items()
    }
