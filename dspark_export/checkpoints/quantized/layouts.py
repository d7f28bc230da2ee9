"""From stored integers and small floats to the float32 values they stand for, one function for each published layout.

Shapes are those of the stored tensors; the result is [out, in], as a linear layer of torch has it, unless said
otherwise. Products of a code and a scale in half precision are exact in float32.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

AWQ_NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where AWQ's kernels keep output 0, 1, ... 7 of a word."""

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
Parts = Mapping[str, torch.Tensor]


def unpacked(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes along the last dimension of int32 ``words``, the lowest bits first, across words where they do not fit."""
    octets = words.contiguous().view(torch.uint8)
    if 8 % bits == 0:
        mask = 2**bits - 1
        pieces = [(octets >> shift) & mask for shift in range(0, 8, bits)]
        return torch.stack(pieces, dim=-1).reshape(*octets.shape[:-1], -1)
    unsigned = words.long() & 0xFFFFFFFF
    count = words.shape[-1] * 32 // bits
    start = torch.arange(count) * bits
    word, offset = start // 32, start % 32
    following = (word + 1).clamp(max=words.shape[-1] - 1)
    both = (unsigned[..., word] >> offset) | (unsigned[..., following] << (32 - offset))
    codes: torch.Tensor = both & (2**bits - 1)
    return codes.to(torch.uint8)


def fp4(octets: torch.Tensor) -> torch.Tensor:
    """E2M1 values of a byte's two halves, the lower first: twice as many along the last dimension."""
    table = torch.tensor([*_E2M1, *(-value for value in _E2M1)])
    return table[torch.stack([octets & 15, octets >> 4], dim=-1).flatten(-2).long()]


def exponents(octets: torch.Tensor) -> torch.Tensor:
    """E8M0 scales: powers of two, biased by 127."""
    return torch.ldexp(torch.ones_like(octets, dtype=torch.float32), octets.int() - 127)


def gptq(parts: Parts, bits: int, zero_offset: int) -> torch.Tensor:
    """GPTQ: qweight [in * bits / 32, out], qzeros [groups, out * bits / 32], scales [groups, out], g_idx [in].

    ``zero_offset``: 1 where zero points are stored less one, as all but gptq_v2 do.
    """
    codes = unpacked(parts["qweight"].T, bits).float()
    scales = parts["scales"].float().T
    zeros = unpacked(parts["qzeros"], bits).float().T[: scales.shape[0]] + zero_offset
    if "g_idx" in parts:
        group = parts["g_idx"].long()
    else:
        group = torch.arange(codes.shape[1]) // -(-codes.shape[1] // scales.shape[1])
    return (codes - zeros[:, group]) * scales[:, group]


def awq(parts: Parts) -> torch.Tensor:
    """AWQ, version gemm: qweight [in, out / 8], qzeros [groups, out / 8], scales [groups, out]."""
    codes, zeros = (in_order(unpacked(parts[name], 4)).float() for name in ("qweight", "qzeros"))
    scales = parts["scales"].float()
    size = codes.shape[0] // scales.shape[0]
    return ((codes - zeros.repeat_interleave(size, 0)) * scales.repeat_interleave(size, 0)).T


def in_order(codes: torch.Tensor) -> torch.Tensor:
    """Codes of AWQ's words [rows, outputs] by output."""
    rows, columns = codes.shape
    return codes.reshape(rows, -1, 8)[..., list(AWQ_NIBBLES)].reshape(rows, columns)


def scaled(parts: Parts, block: tuple[int, int] | None) -> torch.Tensor:
    """Integers or FP8 with a scale for the tensor, a channel, a group of inputs or a block.

    weight [..., out, in]; weight_scale [], [1], [out], [..., out, 1], [..., out, groups] or one for each ``block``, the
    last of which may be cut off; weight_zero_point like it; weight_g_idx [in]: the group of an input.
    """
    codes = parts["weight"].float()
    if "zero_point" in parts:
        codes = codes - _spread(parts["zero_point"], codes.shape, block, parts.get("g_idx"))
    return codes * _spread(parts["scale"], codes.shape, block, parts.get("g_idx"))


def packed_integers(parts: Parts, bits: int, shape: tuple[int, ...]) -> torch.Tensor:
    """compressed-tensors' pack-quantized: signed codes plus 2**(bits-1), weight_packed [..., out, in * bits / 32].

    weight_zero_point is packed along the outputs: [out * bits / 32, groups].
    """
    offset = 2 ** (bits - 1)
    codes: torch.Tensor = unpacked(parts["packed"], bits)[..., : shape[-1]].float() - offset
    if "zero_point" in parts:
        zeros = unpacked(parts["zero_point"].T, bits)[:, : shape[-2]].T.float() - offset
        codes = codes - _spread(zeros, codes.shape, None, parts.get("g_idx"))
    return codes * _spread(parts["scale"], codes.shape, None, parts.get("g_idx"))


def mxfp4_experts(parts: Parts) -> torch.Tensor:
    """gpt-oss: blocks [experts, out, groups, 16] and scales [experts, out, groups] to [experts, in, out]."""
    values = fp4(parts["blocks"]) * exponents(parts["scales"])[..., None]
    experts, out = values.shape[:2]
    whole: torch.Tensor = values.reshape(experts, out, -1).transpose(-1, -2)
    return whole.contiguous()


def packed_fp4(parts: Parts, group: int) -> torch.Tensor:
    """NVFP4 and MXFP4 of linear layers: packed [out, in / 2], a scale for ``group`` inputs, and one for all of them.

    ``multiplier`` multiplies (NVIDIA ModelOpt), ``divisor`` divides (compressed-tensors).
    """
    return fp4(parts["packed"]) * fp4_scales(parts).repeat_interleave(group, -1)


def fp4_scales(parts: Parts) -> torch.Tensor:
    """What the values of a group are multiplied by."""
    scale = parts["scale"]
    scales = exponents(scale) if scale.dtype == torch.uint8 else scale.float()
    if "multiplier" in parts:
        scales = scales * parts["multiplier"].float()
    if "divisor" in parts:
        scales = scales / parts["divisor"].float()
    return scales


def _spread(
    scales: torch.Tensor, shape: torch.Size, block: tuple[int, int] | None, group: torch.Tensor | None
) -> torch.Tensor:
    """``scales`` for every element of ``shape``, or broadcastable to it."""
    scales = scales.float()
    if scales.numel() == 1:
        return scales.reshape(())
    if scales.ndim == 1:
        scales = scales[:, None]
    if group is not None and bool((group >= 0).all()):
        return scales[..., group.long()]
    for dim in (-2, -1):
        size = shape[dim]
        if scales.shape[dim] not in (1, size):
            step = block[dim] if block else size // scales.shape[dim]
            scales = scales.repeat_interleave(step, dim).narrow(dim, 0, size)
    return scales
