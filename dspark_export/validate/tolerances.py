"""How far two ways of computing the same may differ, and why. Limits that depend on the precision are defined with it.

Graph against PyTorch, :data:`AGAINST_MODEL`:

| stored as | limit | why |
|---|---|---|
| floats | 1e-4 | both sides compute in float32, with the same rounded weights; sums are ordered differently |
| integers | 1e-4 | PyTorch is given the numbers that quantized weights stand for, products are in float32 |

Forms of a graph that multiply integers cannot do without rounded activations: :data:`ROUNDED`, relative root mean
square of the worst output, 0.24 for SmolLM2-135M and less for tiny models.

The cost of quantization itself is reported in figures and has no limit, since it was requested. A tensor that it ruins
is caught by the limits on stored weights.

The same graph in another form or arrangement, :data:`BETWEEN_FORMS`: 1e-4 for all weights, since quantized products
then compute in float32 too (rounded activations would turn a last bit into a step of 1/127).

Stored weights against the model's own, and quantized drafters against PyTorch before quantization: limits of each
precision, which are defined in :data:`~dspark_runtime.bundle.precisions.PRECISIONS`.
"""

from __future__ import annotations

import numpy as np

from dspark_runtime.arrays import AnyArray

AGAINST_MODEL = 1e-4
"""Graph against PyTorch with the same weights, by :func:`largest_relative`."""

LLAMA_CPP = 5e-3
"""PyTorch against llama.cpp on a GGUF file in float32, of the range of the logits: llama.cpp looks gelu up in a table
of half-precision numbers."""

LLAMA_CPP_QUANTIZED = 0.05
"""The same on other files, where llama.cpp rounds activations too: to 16 bits, or to 8 where weights are quantized."""

ROUNDED = 0.3
"""Forms of a graph that multiply integers, and so round activations to 8 bits, against PyTorch that does not, by
:func:`relative_rms`."""

BETWEEN_FORMS = 1e-4
"""Two forms or arrangements of one graph, by :func:`largest_relative`."""

ENGINE = {"float16": 0.02, "bfloat16": 0.10}
"""TensorRT's engines, which compute in 16 bits, against ONNX Runtime in float32, by :func:`relative_rms`: 11 and 8 bits
of every activation, added up over the layers."""

ACCEPTANCE = 0.01
"""Prefix survival of a drafter in the runtime against the PyTorch reference, at every depth."""

ACCEPTANCE_QUANTIZED = 0.05
"""The same where the bundle's target is quantized: it is another model than the reference and feeds the drafter other
features."""

ACCEPTANCE_DROP = 0.10
"""Share of its accepted length above 1 a drafter may lose against its floor."""


def largest_relative(found: AnyArray, wanted: AnyArray) -> float:
    """Largest difference over the largest magnitude of ``wanted``, at least 1; infinite if not finite."""
    a, b = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    if a.shape != b.shape or not np.isfinite(a).all():
        return float("inf")
    return float(np.abs(a - b).max() / max(1.0, float(np.abs(b).max()))) if a.size else 0.0


def relative_rms(found: AnyArray, wanted: AnyArray, least: float = 1e-6) -> float:
    """Root mean square of the difference over that of ``wanted``, at least ``least``; infinite if not finite."""
    a, b = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    if a.shape != b.shape or not np.isfinite(a).all():
        return float("inf")
    return float(np.sqrt(np.mean((a - b) ** 2)) / max(least, float(np.sqrt(np.mean(b**2))))) if a.size else 0.0
