"""The bundle's TensorRT engines against ONNX Runtime on the same real passes. Needs the GPU they were compiled for."""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dspark_export.validate.activations import record
from dspark_export.validate.checks import Check
from dspark_export.validate.numerics import cache_shapes, compare, quiet, save_inputs
from dspark_export.validate.references import GraphRunner
from dspark_export.validate.tolerances import ENGINE, relative_rms
from dspark_runtime.arrays import AnyArray
from dspark_runtime.backends.tensorrt_check import checked_plan, require_device, require_version
from dspark_runtime.backends.tensorrt_device import installed_version, this_device
from dspark_runtime.bundle.contract import INPUT_IDS, PRESENT, WRITE_INDICES
from dspark_runtime.bundle.engine_entry import EngineEntry
from dspark_runtime.bundle.engine_names import Flavour
from dspark_runtime.bundle.files import BundleFiles
from dspark_runtime.errors import UsageError


def engines_of(files: BundleFiles, flavour: Flavour) -> list[EngineEntry]:
    """Engines of the target and the self-draft that can run here.

    Raises:
        UsageError: the bundle has none of this flavour.
        EngineRefused: they cannot run on this machine, and why.
    """
    found = [e for e in files.manifest.engines if e.flavour == flavour and e.graph in ("target", "self_draft")]
    if not found:
        raise UsageError(
            f"--against {flavour}: the bundle has no such engines; make them with `dspark-export compile BUNDLE "
            f"--backend {flavour}`"
        )
    for entry in found:
        require_version(entry, installed_version(flavour))
        require_device(entry, this_device())
    return found


def check_engines(
    files: BundleFiles, engines: Sequence[EngineEntry], texts: Sequence[Sequence[int]], threads: int | None, keep: Path
) -> Iterator[Check]:
    """One check per engine; on a failure the inputs of the worst pass are kept below ``keep``."""
    for entry in engines:
        began = time.perf_counter()
        graph = files.graph(entry.graph, prefer=("onnxruntime-cpu",))
        limit = ENGINE[entry.dtype]
        shapes = {
            name: ((*shape[:2], entry.capacity, shape[3]), kind) for name, (shape, kind) in cache_shapes(graph).items()
        }
        worst = None
        for number, ids in enumerate(texts):
            host = GraphRunner(files.path(graph.file), "onnxruntime", threads)
            with quiet(), host:
                passes = record(host.whole, ids, shapes, seed=number)
            found = compare(host, engine_runner(files, entry), passes, relative_rms)
            if worst is None or found.measured > worst.measured:
                worst = found
        assert worst is not None
        passed = worst.measured <= limit
        command = (
            "" if passed else save_inputs(keep / f"{entry.graph}.{entry.flavour}", files.path(entry.file), worst.one)
        )
        yield Check(
            id=f"numerics.{entry.graph}.{entry.flavour}",
            family="numerics",
            title=f"{entry.graph} engine of {entry.flavour} against ONNX Runtime",
            status="passed" if passed else "failed",
            measured=worst.measured if np.isfinite(worst.measured) else None,
            limit=limit,
            unit="root mean square, relative",
            where="" if passed else worst.output,
            message="" if passed else f"{worst.output} is off in the {worst.one.name}. Its inputs are kept: {command}",
            seconds=time.perf_counter() - began,
            data={"passes": worst.by_pass},
        )


def engine_runner(files: BundleFiles, entry: EngineEntry) -> Any:
    """A Polygraphy runner of an engine; the plan is checked first and may not hold code for the host."""
    plan = checked_plan(files, entry)
    if entry.flavour == "tensorrt-rtx":
        os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "1"  # read when Polygraphy's TensorRT backend is first imported
    from polygraphy.backend.trt import EngineFromBytes, TrtRunner

    kinds = {"float16": np.float16, "bfloat16": np.float32}

    class EngineRunner(TrtRunner):  # type: ignore[misc]
        """Gives a pass the profile it fits, and of the caches the rows of the pass."""

        def infer_impl(self, feed_dict: dict[str, AnyArray], *args: Any, **named: Any) -> OrderedDict[str, AnyArray]:
            """Polygraphy's hook."""
            count, start = feed_dict[INPUT_IDS].shape[1], int(feed_dict[WRITE_INDICES][0])
            fits = [i for i, p in enumerate(entry.profiles) if p.dims["tokens"][0] <= count <= p.dims["tokens"][2]]
            self.set_profile(fits[0] if fits else 0)
            feeds = {n: a.astype(kinds[entry.dtype]) if a.dtype.kind == "f" else a for n, a in feed_dict.items()}
            found = super().infer_impl(feeds, *args, **named)
            return OrderedDict(
                (name, array[:, :, start : start + count] if name.startswith(PRESENT) else array)
                for name, array in found.items()
            )

    return EngineRunner(EngineFromBytes(plan), name=f"{entry.flavour} {entry.version}")
