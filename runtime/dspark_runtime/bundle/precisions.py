"""The precisions a bundle can have: one row each, read by every part of the code that treats them differently.

A new precision is a name in :data:`Weights` and a row in :data:`PRECISIONS`. The options of the command line with their
help and errors, graph rewrites, the limits of ``dspark-export validate``, benchmarks and samples read it there. See
docs/precision.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

Weights = Literal["fp32", "fp16", "bf16", "w8a8", "int8", "int4", "keep"]
FloatType = Literal["float32", "float16", "bfloat16"]
Activations = Literal["fp32", "fp16", "bf16"]


@dataclass(frozen=True)
class PrecisionKind:
    """How weights are stored, and what follows from it.

    Attributes:
        stored_within: how far a stored tensor may be from the model's: root mean square of the difference, relative.
        dtype: of float weights, which the graph computes in too. None: weights are integers, and the graph computes in
            what ``--activations`` says.
        bits: of a quantized weight.
        block: weights per scale unless ``--block-size`` says otherwise. None: one scale for each output.
        integer_products: the CPU's forms of the graphs multiply integers, and so round activations to 8 bits whatever
            is asked for; the standard form alone has float products.
        exact_by_default: speculative text equals plain text by the bundle's own setting. Otherwise it does so
            only in bundles with a drafter, where nearly every pass has several rows anyway, if rows were measured to
            agree.
        kept: weights are the checkpoint's own integers, with its own scales.
        draft_within: how far outputs of a quantized drafter may be from PyTorch's before quantization, as
            ``stored_within``. None: the limit of float graphs.
    """

    stored_within: float
    dtype: FloatType | None = None
    bits: int | None = None
    block: int | None = None
    integer_products: bool = False
    exact_by_default: bool = True
    kept: bool = False
    draft_within: float | None = None

    @property
    def quantized(self) -> bool:
        """Whether weights are stored as integers."""
        return self.bits is not None or self.kept

    @property
    def blocked(self) -> bool:
        """Whether several weights of an output share a scale; activations and sizes of blocks can be chosen then."""
        return self.block is not None

    def computes_in(self, activations: Activations) -> FloatType:
        """What the graph computes in, if quantized weights are expanded to ``activations``."""
        return self.dtype or FLOAT_TYPES[activations]


FLOAT_TYPES: Mapping[Activations, FloatType] = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}

PRECISIONS: Mapping[Weights, PrecisionKind] = {
    # The same bits.
    "fp32": PrecisionKind(stored_within=0.0, dtype="float32"),
    # 11 bits: half a unit of the last one is 2.4e-4; more for numbers below 6e-5.
    "fp16": PrecisionKind(stored_within=1e-3, dtype="float16"),
    # 8 bits: half a unit of the last one is 2.0e-3.
    "bf16": PrecisionKind(stored_within=4e-3, dtype="bfloat16"),
    # 63 steps for a whole output: 0.024 for SmolLM2-135M, more where few weights are large.
    "w8a8": PrecisionKind(stored_within=0.1, bits=8, integer_products=True, draft_within=0.3),
    # A block's largest of 64 weights is about 2.3 times its deviation, in 127 steps. Blocks of 64 are a seventh faster
    # than blocks of 32 and nearly as close. A second row costs a plain pass a fifth, as it does of int4.
    "int8": PrecisionKind(stored_within=0.02, bits=8, block=64, exact_by_default=False, draft_within=0.08),
    # The same in 7 steps: about 0.09 for normally distributed weights. Blocks of 64 cost too much.
    "int4": PrecisionKind(stored_within=0.20, bits=4, block=32, exact_by_default=False, draft_within=0.60),
    # Nothing is rounded. Drafters share what they read of the target, and have floats otherwise.
    "keep": PrecisionKind(stored_within=0.0, kept=True, exact_by_default=False),
}

QUANTIZED = tuple(name for name, kind in PRECISIONS.items() if kind.quantized)
BLOCKED = tuple(name for name, kind in PRECISIONS.items() if kind.blocked)
HALF = tuple(name for name, kind in PRECISIONS.items() if kind.dtype in ("float16", "bfloat16"))
"""Precisions whose graphs compute in half precision whatever else is requested."""


def listed(names: Iterable[str], word: str = "or") -> str:
    """``names`` in a sentence: "fp16, bf16 or int8"."""
    *first, last = names
    return f"{', '.join(first)} {word} {last}" if first else last
