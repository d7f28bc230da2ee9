"""The integers of published layouts as they are stored, for ``--precision keep``; :mod:`.layouts` says what they are.

Each function takes the parts that its namesake in :mod:`.layouts` takes, of a weight [out, in], and raises
:class:`NotHeld` for what is not a grid of blocks along the inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy.typing as npt
import torch

from dspark_export.checkpoints.quantized import layouts
from dspark_export.grids import Grid, NotHeld

Parts = Mapping[str, torch.Tensor]
_ORDER = "its inputs are grouped in another order than they are multiplied in (act-order)"


def gptq(parts: Parts, bits: int, zero_offset: int) -> Grid:
    codes = layouts.unpacked(parts["qweight"].T, bits)
    scales = parts["scales"].float().T
    zeros = layouts.unpacked(parts["qzeros"], bits).T[: scales.shape[0]].short() + zero_offset
    _check_order(parts, codes.shape[1], scales.shape[1])
    return Grid(_array(codes), _array(scales), _array(zeros))


def awq(parts: Parts) -> Grid:
    codes, zeros = (layouts.in_order(layouts.unpacked(parts[name], 4)) for name in ("qweight", "qzeros"))
    return Grid(_array(codes.T), _array(parts["scales"].float().T), _array(zeros.T))


def scaled(parts: Parts, block: tuple[int, int] | None) -> Grid:
    codes = parts["weight"]
    if codes.ndim != 2:
        raise NotHeld("it is not one matrix")
    scale = _by_output(parts["scale"].float(), codes.shape, block)
    _check_order(parts, codes.shape[1], scale.shape[1])
    zero = _by_output(parts["zero_point"], codes.shape, block) if "zero_point" in parts else None
    return Grid(_array(codes), _array(scale), None if zero is None else _array(zero))


def packed_integers(parts: Parts, bits: int, shape: tuple[int, ...]) -> Grid:
    if len(shape) != 2:
        raise NotHeld("it is not one matrix")
    offset = 2 ** (bits - 1)
    codes = layouts.unpacked(parts["packed"], bits)[:, : shape[1]].short() - offset
    scale = _by_output(parts["scale"].float(), codes.shape, None)
    _check_order(parts, shape[1], scale.shape[1])
    if "zero_point" not in parts:
        return Grid(_array(codes), _array(scale))
    zeros = layouts.unpacked(parts["zero_point"].T, bits)[:, : shape[0]].T.short() - offset
    return Grid(_array(codes), _array(scale), _array(_by_output(zeros, codes.shape, None)))


def packed_fp4(parts: Parts, group: int) -> Grid:
    """Values of E2M1 are halves: twice as much is an integer, and half of a scale is exact."""
    whole = layouts.fp4(parts["packed"]) * 2
    if whole.ndim != 2:
        raise NotHeld("it is not one matrix")
    return Grid(_array(whole.to(torch.int8)), _array(layouts.fp4_scales(parts) / 2))


def _check_order(parts: Parts, inputs: int, groups: int) -> None:
    order = parts.get("g_idx")
    if inputs % groups:
        raise NotHeld(f"{inputs} inputs are not a multiple of their {groups} scales")
    if order is None or bool((order < 0).any()):
        return
    if not torch.equal(order.long(), torch.arange(inputs) // (inputs // groups)):
        raise NotHeld(_ORDER)


def _by_output(scales: torch.Tensor, shape: torch.Size, block: tuple[int, int] | None) -> torch.Tensor:
    """``scales`` as [out, groups of inputs]."""
    out, inputs = shape
    if scales.numel() == 1:
        return scales.reshape(1, 1).expand(out, 1)
    if scales.ndim == 1:
        scales = scales[:, None]
    if block is None:
        return scales.expand(out, -1)
    if inputs % block[1]:
        raise NotHeld(f"{inputs} inputs are not a multiple of blocks of {block[1]}")
    return scales.repeat_interleave(block[0], 0)[:out]


def _array(tensor: torch.Tensor) -> npt.NDArray[Any]:
    found: npt.NDArray[Any] = tensor.contiguous().numpy()
    return found
