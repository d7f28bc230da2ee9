"""How far two ways of computing the same may differ, and why. The one place with such numbers.

Graph against PyTorch, :data:`AGAINST_MODEL`:

| stored as | limit | why |
|---|---|---|
| fp32, fp16, bf16 | 1e-4 | both sides compute in float32, with the same rounded weights; sums are ordered differently |
| w8a8, int8, int4 | 1e-4 | PyTorch is given the numbers that quantized weights stand for, products are in float32 |

The forms of a w8a8 graph that round activations cannot be had without: :data:`ROUNDED`, relative root mean square of
the worst output, 0.24 for SmolLM2-135M and less for tiny models.

What quantization itself costs is told in figures and has no limit: it is what was asked for. A tensor that it maims is
found by the limits on stored weights.

The same graph in another form or arrangement, :data:`BETWEEN_FORMS`: 1e-4 for all weights, since quantized products
then compute in float32 too (rounded activations would turn a last bit into a step of 1/127).

Stored weights against the model's own, :data:`STORED`: relative root mean square of the worst tensor.

| stored as | limit | why |
|---|---|---|
| fp32 | 0 | the same bits |
| fp16 | 1e-3 | 11 bits, half a unit of the last one is 2.4e-4; more for numbers below 6e-5 |
| bf16 | 4e-3 | 8 bits, half a unit of the last one is 2.0e-3 |
| w8a8 | 0.1 | 63 steps for a whole output: 0.024 for SmolLM2-135M, more where few weights are large |
| int8 | 0.02 | a block's largest of 64 weights is about 2.3 times its deviation, in 127 steps |
| int4 | 0.20 | the same in 7 steps: about 0.09 for normally distributed weights |
"""

from __future__ import annotations

import numpy as np

from dspark_runtime.backends.protocol import AnyArray

AGAINST_MODEL = 1e-4
"""Graph against PyTorch with the same weights, by :func:`largest_relative`."""

ROUNDED = 0.3
"""Forms of a w8a8 graph that round activations to 8 bits, against PyTorch that does not, by :func:`relative_rms`."""

QUANTIZED_DRAFT = {"w8a8": 0.3, "int8": 0.08, "int4": 0.60}
"""Graphs of quantized drafters against PyTorch before quantization, by :func:`relative_rms`."""

BETWEEN_FORMS = 1e-4
"""Two forms or arrangements of one graph, by :func:`largest_relative`."""

ENGINE = {"float16": 0.02, "bfloat16": 0.10}
"""TensorRT's engines, which compute in 16 bits, against ONNX Runtime in float32, by :func:`relative_rms`: 11 and 8 bits
of every activation, added up over the layers."""

STORED = {"w8a8": 0.1, "fp32": 0.0, "fp16": 1e-3, "bf16": 4e-3, "int8": 0.02, "int4": 0.20}
"""Stored weights against the model's, by :func:`relative_rms`."""

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
