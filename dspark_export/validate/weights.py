"""Are the stored weights the model's? Every tensor of the target against a fresh export, and, where weights are
quantized, what they stand for against what they were."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from dspark_export.passes.packed_weights import load_plain
from dspark_export.validate.checks import Check
from dspark_export.validate.quantized import quantized_weights
from dspark_export.validate.tolerances import relative_rms
from dspark_runtime.bundle.files import BundleFiles

if TYPE_CHECKING:
    from dspark_export.validate.rebuild import Rebuilt

Tensor = npt.NDArray[Any]


def check_weights(files: BundleFiles, rebuilt: Rebuilt) -> Check:
    """The worst tensor of the bundle's standard target graph."""
    began = time.perf_counter()
    precision = files.manifest.precision
    limit = precision.kind.stored_within
    stored = load_plain(files.path(files.graph("target").file))
    fresh = rebuilt.graphs["target"]
    clean = dict(fresh.graph.initializers)
    missing = sorted(set(clean) ^ set(stored.graph.initializers))
    off: dict[str, float] = {}
    for name, value in stored.graph.initializers.items():
        if name in clean and value.const_value is not None and clean[name].const_value is not None:
            mine, theirs = value.const_value.numpy(), clean[name].const_value.numpy()  # type: ignore[union-attr]
            if mine.shape != theirs.shape or mine.tobytes() != theirs.tobytes():
                off[name] = _distance(mine, theirs)
    rounding = _rounding(fresh, rebuilt.plain_weights())
    coarse = {name: size for name, size in rounding.items() if size > limit}
    worst = max(rounding.values(), default=0.0)
    message, where = "", ""
    if missing:
        where = missing[0]
        message = f"{len(missing)} tensors are in only one of the bundle and a fresh export; build the bundle again."
    elif off:
        where = max(off, key=lambda name: off[name])
        worst = max(worst, off[where])
        message = (
            f"{len(off)} tensors are not what a fresh export of the model stores, {where} is {off[where]:.2g} off; "
            "build the bundle again, or give --model the checkpoint it was built from."
        )
    elif coarse:
        where = max(coarse, key=lambda name: coarse[name])
        message = (
            f"{precision.weights} keeps {len(coarse)} tensors only to {coarse[where]:.2g}; the limit is {limit:.2g}. "
            "Smaller blocks (--block-size) or another --precision keep more of them."
        )
    shown = sorted(rounding.items(), key=lambda item: -item[1])[:12]
    return Check(
        id="numerics.weights",
        family="numerics",
        title="Stored weights are the model's",
        status="failed" if message else "passed",
        measured=float(worst) if np.isfinite(worst) else None,
        limit=limit,
        unit="root mean square, relative",
        where=where,
        message=message,
        seconds=time.perf_counter() - began,
        data={"tensors": len(stored.graph.initializers), "differing": len(off), "coarsest": dict(shown)},
    )


def _distance(mine: Tensor, theirs: Tensor) -> float:
    if mine.shape != theirs.shape:
        return float("inf")
    return relative_rms(mine.astype(np.float64), theirs.astype(np.float64))


def _rounding(graph: ir.Model, plain: dict[str, Tensor]) -> dict[str, float]:
    """How far the numbers that quantized tensors stand for are from the weights they were made of."""
    products, tables = quantized_weights(graph)
    found = {}
    for name, wide in products.items():
        original = plain.get(name, plain.get(name.removesuffix(".T")))
        if original is not None:
            found[name] = relative_rms(wide, original.T if name.endswith(".T") else original)
    for name, rows in tables.items():
        if name in plain:
            found[f"{name} (rows)"] = relative_rms(
                rows, plain[name] if plain[name].shape == rows.shape else plain[name].T
            )
    return found
