"""What the setting ``exact`` asks of a backend: see docs/exactness.md.

What a build measured on the sequence kernels says nothing about the operators that run where these are missing.
"""

from __future__ import annotations

from dspark_runtime.backends.opening import Backend, rows_are_equal
from dspark_runtime.backends.protocol import FLOAT_PRODUCTS, ROUNDED_ACTIVATIONS
from dspark_runtime.bundle.files import BundleFiles
from dspark_runtime.errors import UsageError


def accuracy_level(files: BundleFiles, exact: bool) -> int:
    """Arithmetic of quantized products: 8-bit activations, unless exact text was seen to need float32 ones."""
    precision = files.manifest.precision
    if not precision.quantized:
        return 0
    elsewhere = _made_for_kernels(files) and not rows_are_equal(files)
    agree = precision.rows_agree and not elsewhere
    return FLOAT_PRODUCTS if exact and not agree else precision.accuracy_level or ROUNDED_ACTIVATIONS


def require_equal_batches(files: BundleFiles, backend: Backend) -> None:
    """UsageError unless a row's logits are known to be the same whatever runs beside it."""
    if backend.rows_are_equal or not backend.measured:
        return
    noise = files.manifest.precision.row_noise
    found = None if noise is None or _made_for_kernels(files) else noise.between_batches
    if found == 0.0:
        return
    what = "was not measured" if found is None else f"moves logits by up to {found:.3g}"
    raise UsageError(
        f"an exact service needs texts that do not depend on what runs beside them, and here that {what}; "
        "open the bundle with exact=False (--no-exact), serve with rows=1, or build it again where the sequence "
        "kernels are"
    )


def _made_for_kernels(files: BundleFiles) -> bool:
    return any(graph.kernels for graph in files.manifest.graphs)
