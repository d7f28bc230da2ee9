"""Weights that a checkpoint stores as integers in blocks, and how graphs store the same integers.

A :class:`Grid` is what a checkpoint says: ``(codes - zero) * scale``, or ``codes * scale + minimum``. A :class:`Form`
is what a graph has: 4 or 8 bits, signed or with zero points or minima, in blocks that ONNX Runtime and the sequence
kernels take. The numbers are the same to the last bit, or :class:`NotHeld` says why they cannot be.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Codes = npt.NDArray[np.integer]
Floats = npt.NDArray[np.float32]
MOST_BLOCK = 256  # of the sequence kernels
MIN_BLOCK = 16  # ONNX Runtime's kernels take no smaller ones


class NotHeld(Exception):
    """Why no blocks of a graph hold a weight exactly."""


@dataclass(frozen=True)
class Form:
    """How a graph stores a weight: element type of the integers, inputs a block, and what comes with the scales."""

    dtype: Literal["INT4", "UINT4", "INT8", "UINT8"]
    block: int
    points: bool = False
    minimum: bool = False


@dataclass(frozen=True)
class Grid:
    """One weight [out, in]: ``codes`` of that shape, the rest [out, blocks of in].

    ``zero`` is subtracted from codes; ``minimum`` is added after scaling, to codes that are not negative.
    """

    codes: Codes
    scale: Floats
    zero: Codes | None = None
    minimum: Floats | None = None

    @property
    def block(self) -> int:
        """Inputs that share a scale."""
        return int(self.codes.shape[1] // self.scale.shape[1])

    def dequantized(self) -> Floats:
        """The float32 numbers [out, in] that the integers stand for."""
        out, inputs = self.codes.shape
        codes = self.codes.reshape(out, -1, self.block).astype(np.float32)
        if self.zero is not None:
            codes -= self.zero[..., None].astype(np.float32)
        wide: Floats = codes * self.scale[..., None]
        if self.minimum is not None:
            wide += self.minimum[..., None]
        return wide.reshape(out, inputs)

    def in_blocks(self) -> Grid:
        """The same numbers in blocks of a power of two of inputs, from 16 to 256: larger blocks repeat their scale."""
        if self.codes.shape[1] % self.scale.shape[1]:
            raise NotHeld(f"{self.codes.shape[1]} inputs are not a multiple of their {self.scale.shape[1]} scales")
        block = fitting_block(self.block, MOST_BLOCK)
        if not block:
            raise NotHeld(f"scales of {self.block} inputs; blocks have a multiple of {MIN_BLOCK}")
        times = self.block // block

        def spread(array: npt.NDArray[Any] | None) -> npt.NDArray[Any] | None:
            return array if array is None or times == 1 else np.repeat(array, times, axis=1)

        scale = spread(self.scale)
        assert scale is not None
        return Grid(self.codes, scale, spread(self.zero), spread(self.minimum))

    def form(self) -> Form:
        """The smallest form that holds the integers."""
        low, high = int(self.codes.min()), int(self.codes.max())
        if self.minimum is not None:
            if low < 0 or high > 255:
                raise NotHeld(f"integers from {low} to {high}; 8 bits hold 0 to 255")
            return Form("UINT4" if high < 16 else "UINT8", self.block, minimum=True)
        steps = self._steps()
        least, most = int(steps.min()), int(steps.max())
        if least >= -8 and most < 8:
            return Form("INT4", self.block)
        first, last = self._ends()
        if self.zero is not None and last - first < 16:
            return Form("UINT4", self.block, points=True)
        if least >= -128 and most < 128:
            return Form("INT8", self.block)
        if self.zero is not None and last - first < 256:
            return Form("UINT8", self.block, points=True)
        raise NotHeld(f"integers from {least} to {most}; 8 bits hold -128 to 127")

    def stored(self, form: Form) -> dict[str, npt.NDArray[np.generic]]:
        """``weight_q`` [out, in] as integers of 8 bits, ``weight_scale`` and, as ``form`` has it, ``weight_zero_point``
        or ``weight_minimum``, each [out, blocks]."""
        if form.minimum:
            assert self.minimum is not None
            return {
                "weight_q": self.codes.astype(np.uint8),
                "weight_scale": self.scale,
                "weight_minimum": self.minimum,
            }
        if not form.points:
            return {"weight_q": self._steps().astype(np.int8), "weight_scale": self.scale}
        assert self.zero is not None
        first = min(0, self._ends()[0])
        codes, zero = (array.astype(np.int16) - first for array in (self.codes, self.zero))
        return {
            "weight_q": codes.astype(np.uint8),
            "weight_scale": self.scale,
            "weight_zero_point": zero.astype(np.uint8),
        }

    def _steps(self) -> Codes:
        if self.zero is None:
            return self.codes
        wide = self.codes.reshape(len(self.codes), -1, self.block).astype(np.int16) - self.zero[..., None]
        return wide.reshape(self.codes.shape)

    def _ends(self) -> tuple[int, int]:
        """The smallest and largest of codes and zero points, 0 among them."""
        ends = [0, int(self.codes.min()), int(self.codes.max())]
        if self.zero is not None:
            ends += [int(self.zero.min()), int(self.zero.max())]
        return min(ends), max(ends)


def fitting_block(depth: int, most: int | None) -> int | None:
    """The largest block that divides ``depth``, of ``most`` weights or half as many, and so on down to 16.

    0 where none does; None for None, which is a scale for all of an output.
    """
    if most is None:
        return None
    return next((size for size in (most >> i for i in range(8)) if size >= MIN_BLOCK and depth % size == 0), 0)
