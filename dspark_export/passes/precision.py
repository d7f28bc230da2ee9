"""What ``--precision`` does to a graph.

Float weights have the type the model is loaded and traced in; nothing is left to do here. The others are quantized, by
blocks or by outputs, with a check that it really happened.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as ir

from dspark_export.grids import MIN_BLOCK
from dspark_export.passes.keep_blocks import KeepBlocks
from dspark_export.passes.kept_weights import KeptWeights
from dspark_export.passes.quantize_weights import MIN_ELEMENTS, BlockQuantization, QuantizeWeights
from dspark_runtime.bundle.precisions import PRECISIONS, PrecisionKind, Weights
from dspark_runtime.errors import ExportError, UsageError

_WORTH_NAMING = 1 << 14


@dataclass(frozen=True)
class PrecisionSettings:
    """``weights`` as on the command line; the rest applies to quantized ones only, ``block_size`` to those with blocks
    (None: as many as is usual for ``weights``)."""

    weights: Weights = "fp32"
    block_size: int | None = None
    symmetric: bool = True
    head: bool = True
    embedding: bool = True

    def __post_init__(self) -> None:
        if self.weights not in PRECISIONS:
            raise UsageError(f"precision {self.weights!r} does not exist; choose one of {', '.join(PRECISIONS)}")

    @property
    def kind(self) -> PrecisionKind:
        """What follows from ``weights``."""
        return PRECISIONS[self.weights]


@dataclass(frozen=True)
class PrecisionReport:
    """Names of the weights that were quantized, and of matrices of note that were not."""

    quantized: tuple[str, ...] = ()
    left_in_float: tuple[str, ...] = field(default=())


def apply_precision(model: ir.Model, settings: PrecisionSettings, kept: KeptWeights | None = None) -> PrecisionReport:
    """Quantize ``model`` in place as ``settings`` say; ``kept``: the integers of the checkpoint, where they stay.

    Raises ExportError when not one weight could be quantized.
    """
    if kept is not None:
        keep = KeepBlocks(kept, head=settings.head, embedding=settings.embedding)
        keep(model)
        return PrecisionReport(tuple(keep.quantized), tuple(sorted(keep.skipped)))
    bits, block = settings.kind.bits, settings.kind.block and (settings.block_size or settings.kind.block)
    if bits is None:
        return PrecisionReport()
    rewrite = QuantizeWeights(BlockQuantization(bits, block, settings.symmetric, settings.head, settings.embedding))
    rewrite(model)
    if not any(not name.endswith(".rows") for name in rewrite.quantized):
        if block is None:
            raise ExportError(
                f"precision {settings.weights} quantized no weight: no matrix product of this model has a constant "
                f"weight of {MIN_ELEMENTS} numbers or more; choose another --precision"
            )
        raise ExportError(
            f"precision {settings.weights} with block_size {block} quantized no weight: the matrix "
            f"products of this model have fewer than {MIN_ELEMENTS} numbers or input widths that are not a multiple of "
            f"{MIN_BLOCK}; choose another --precision"
        )
    left = [
        name
        for name, value in model.graph.initializers.items()
        if value.dtype is not None
        and value.dtype.is_floating_point()
        and not name.endswith("weight_scale")
        and value.shape is not None
        and len(value.shape) >= 2
        and value.const_value is not None
        and value.const_value.size >= _WORTH_NAMING
    ]
    return PrecisionReport(tuple(rewrite.quantized), tuple(sorted({*left, *rewrite.skipped})))
