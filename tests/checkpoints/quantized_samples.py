"""Quantized checkpoints as tools publish them: layouts written here by hand, and the numbers they stand for."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints.checkpoint_samples import edit_config

Tensors = dict[str, torch.Tensor]
Writer = Callable[[np.random.Generator, str, tuple[int, int]], tuple[Tensors, np.ndarray]]
"""From a generator, a layer's name and the shape [out, in] of its weight: what is stored, and what it stands for."""

E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
FILE = "model.safetensors"


def words(codes: list[int], bits: int) -> list[int]:
    """Codes one after the other from the lowest bit on, cut into signed words of 32 bits."""
    stream = sum(code << (bits * index) for index, code in enumerate(codes))
    count = math.ceil(len(codes) * bits / 32)
    unsigned = [(stream >> (32 * index)) & 0xFFFFFFFF for index in range(count)]
    return [word - 2**32 if word >= 2**31 else word for word in unsigned]


def rows_of_words(codes: np.ndarray, bits: int) -> torch.Tensor:
    return torch.tensor([words(row.tolist(), bits) for row in codes], dtype=torch.int32)


def gptq(bits: int, group: int, order: bool = False, v2: bool = False) -> Writer:
    def write(rng: np.random.Generator, layer: str, shape: tuple[int, int]) -> tuple[Tensors, np.ndarray]:
        out, inputs = shape
        groups = inputs // group
        codes = rng.integers(0, 2**bits, (inputs, out))
        zeros = rng.integers(1, 2**bits, (groups, out))
        scales = rng.uniform(0.01, 0.1, (groups, out)).astype(np.float16)
        of_input = np.arange(inputs) // group
        if order:
            rng.shuffle(of_input)
        weight = np.array(
            [
                [float(scales[of_input[i], o]) * (int(codes[i, o]) - int(zeros[of_input[i], o])) for i in range(inputs)]
                for o in range(out)
            ]
        )
        stored = {
            f"{layer}.qweight": rows_of_words(codes.T, bits).T.contiguous(),
            f"{layer}.qzeros": rows_of_words(zeros - (0 if v2 else 1), bits),
            f"{layer}.scales": torch.from_numpy(scales),
            f"{layer}.g_idx": torch.from_numpy(of_input.astype(np.int32)),
        }
        return stored, weight

    return write


def awq(rng: np.random.Generator, layer: str, shape: tuple[int, int]) -> tuple[Tensors, np.ndarray]:
    out, inputs = shape
    group = 16
    codes, zeros = rng.integers(0, 16, (inputs, out)), rng.integers(0, 16, (inputs // group, out))
    scales = rng.uniform(0.01, 0.1, (inputs // group, out)).astype(np.float16)

    def packed(values: np.ndarray) -> torch.Tensor:
        """Nibble 0 holds output 0, nibble 1 output 2, then 4, 6, 1, 3, 5, 7."""
        order = [8 * word + place for word in range(out // 8) for place in (0, 2, 4, 6, 1, 3, 5, 7)]
        return rows_of_words(values[:, order], 4)

    weight = np.array(
        [
            [float(scales[i // group, o]) * (int(codes[i, o]) - int(zeros[i // group, o])) for i in range(inputs)]
            for o in range(out)
        ]
    )
    stored = {"qweight": packed(codes), "qzeros": packed(zeros), "scales": torch.from_numpy(scales)}
    return {f"{layer}.{name}": tensor for name, tensor in stored.items()}, weight


def fp8(scale_name: str, scale_shape: Callable[[int, int], tuple[int, ...]], block: tuple[int, int]) -> Writer:
    """FP8 codes with a scale for each ``block``; ``scale_shape`` is how the scales are stored."""

    def write(rng: np.random.Generator, layer: str, shape: tuple[int, int]) -> tuple[Tensors, np.ndarray]:
        codes = torch.from_numpy(rng.normal(size=shape)).to(torch.float8_e4m3fn)
        rows, columns = (math.ceil(size / step) for size, step in zip(shape, block, strict=True))
        scales = rng.uniform(0.1, 2.0, (rows, columns)).astype(np.float32)
        values = codes.to(torch.float64).numpy()
        weight = np.array(
            [[values[o, i] * scales[o // block[0], i // block[1]] for i in range(shape[1])] for o in range(shape[0])]
        )
        stored = torch.from_numpy(scales).reshape(scale_shape(rows, columns))
        return {f"{layer}.weight": codes, f"{layer}.{scale_name}": stored}, weight

    return write


def int8(asymmetric: bool) -> Writer:
    def write(rng: np.random.Generator, layer: str, shape: tuple[int, int]) -> tuple[Tensors, np.ndarray]:
        codes = rng.integers(-128, 128, shape).astype(np.int8)
        scales = torch.from_numpy(rng.uniform(0.001, 0.01, (shape[0], 1))).to(torch.bfloat16)
        zeros = rng.integers(-20, 20, (shape[0], 1)).astype(np.int8) if asymmetric else np.zeros((shape[0], 1), np.int8)
        weight = (codes.astype(float) - zeros) * scales.double().numpy()
        stored = {f"{layer}.weight": torch.from_numpy(codes), f"{layer}.weight_scale": scales}
        if asymmetric:
            stored[f"{layer}.weight_zero_point"] = torch.from_numpy(zeros)
        return stored, weight

    return write


def packed_int(bits: int, group: int, asymmetric: bool = False, order: bool = False) -> Writer:
    def write(rng: np.random.Generator, layer: str, shape: tuple[int, int]) -> tuple[Tensors, np.ndarray]:
        out, inputs = shape
        half = 2 ** (bits - 1)
        codes = rng.integers(-half, half, shape)
        grid = (out, inputs // group)
        zeros = rng.integers(-half, half, grid) if asymmetric else np.zeros(grid, int)
        scales = torch.from_numpy(rng.uniform(0.01, 0.1, grid)).to(torch.bfloat16)
        of_input = np.arange(inputs) // group
        if order:
            rng.shuffle(of_input)
        real = scales.double().numpy()
        weight = np.array(
            [[(codes[o, i] - zeros[o, of_input[i]]) * real[o, of_input[i]] for i in range(inputs)] for o in range(out)]
        )
        stored = {
            "weight_packed": rows_of_words(codes + half, bits),
            "weight_scale": scales,
            "weight_shape": torch.tensor(shape),
        }
        if asymmetric:
            stored["weight_zero_point"] = rows_of_words((zeros + half).T, bits).T.contiguous()
        if order:
            stored["weight_g_idx"] = torch.from_numpy(of_input.astype(np.int32))
        return {f"{layer}.{name}": tensor for name, tensor in stored.items()}, weight

    return write


def fp4(packed: str, whole: str, divides: bool, group: int = 16) -> Writer:
    def write(rng: np.random.Generator, layer: str, shape: tuple[int, int]) -> tuple[Tensors, np.ndarray]:
        out, inputs = shape
        codes = rng.integers(0, 16, shape)
        overall = 3.0 if divides else 0.25
        if group == 16:
            scales = torch.from_numpy(rng.uniform(0.1, 2, (out, inputs // group))).to(torch.float8_e4m3fn)
            real = scales.double().numpy() * (1 / overall if divides else overall)
        else:
            scales = torch.from_numpy(rng.integers(120, 130, (out, inputs // group)).astype(np.uint8))
            real = 2.0 ** (scales.numpy().astype(float) - 127)
        weight = np.array([[E2M1[codes[o, i]] * real[o, i // group] for i in range(inputs)] for o in range(out)])
        octets = torch.from_numpy((codes[:, ::2] + 16 * codes[:, 1::2]).astype(np.uint8))
        stored = {f"{layer}.{packed}": octets, f"{layer}.weight_scale": scales}
        if whole:
            stored[f"{layer}.{whole}"] = torch.tensor(overall)
        return stored, weight

    return write


def compressed(layout: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": {"group_0": group},
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
    }


FP8_BLOCKS = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [24, 24], "activation_scheme": "dynamic"}
FLOATS = {"num_bits": 8, "type": "float"}
CASES: dict[str, tuple[dict[str, Any], Writer]] = {
    "gptq 4 bits": ({"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": False}, gptq(4, 16)),
    "gptq 3 bits": ({"quant_method": "gptq", "bits": 3, "group_size": 16}, gptq(3, 16)),
    "gptq 2 bits": ({"quant_method": "gptq", "bits": 2, "group_size": 16}, gptq(2, 16)),
    "gptq 8 bits, one group": ({"quant_method": "gptq", "bits": 8, "group_size": -1}, gptq(8, 32)),
    "gptq in another order": ({"quant_method": "gptq", "bits": 4, "desc_act": True}, gptq(4, 16, order=True)),
    "gptq_v2": ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2"}, gptq(4, 16, v2=True)),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm", "zero_point": True}, awq),
    "fp8, blocks that are cut off": (FP8_BLOCKS, fp8("weight_scale_inv", lambda r, c: (r, c), (24, 24))),
    "fp8, a scale for the tensor": (
        {"quant_method": "fp8", "weight_block_size": None, "activation_scheme": "static"},
        fp8("weight_scale_inv", lambda r, c: (), (10**6, 10**6)),
    ),
    "fbgemm fp8": (
        {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0},
        fp8("weight_scale", lambda r, c: (r, 1), (1, 10**6)),
    ),
    "compressed-tensors, float-quantized channels": (
        compressed("float-quantized", **FLOATS, strategy="channel"),
        fp8("weight_scale", lambda r, c: (r, 1), (1, 10**6)),
    ),
    "compressed-tensors, float-quantized tensors": (
        compressed("float-quantized", **FLOATS, strategy="tensor"),
        fp8("weight_scale", lambda r, c: (1,), (10**6, 10**6)),
    ),
    "compressed-tensors, float-quantized blocks": (
        compressed("float-quantized", **FLOATS, strategy="block", block_structure=[24, 24]),
        fp8("weight_scale", lambda r, c: (r, c), (24, 24)),
    ),
    "compressed-tensors, int-quantized": (
        compressed("int-quantized", num_bits=8, type="int", strategy="channel", symmetric=True),
        int8(False),
    ),
    "compressed-tensors, int-quantized with zero points": (
        compressed("int-quantized", num_bits=8, type="int", strategy="channel", symmetric=False),
        int8(True),
    ),
    "compressed-tensors, pack-quantized": (
        compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=16),
        packed_int(4, 16),
    ),
    "compressed-tensors, pack-quantized, 8 bits": (
        compressed("pack-quantized", num_bits=8, type="int", strategy="group", group_size=16),
        packed_int(8, 16),
    ),
    "compressed-tensors, pack-quantized with zero points": (
        compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=16, symmetric=False),
        packed_int(4, 16, asymmetric=True),
    ),
    "compressed-tensors, pack-quantized in another order": (
        compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=16, actorder="group"),
        packed_int(4, 16, order=True),
    ),
    "compressed-tensors, nvfp4": (
        compressed("nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16),
        fp4("weight_packed", "weight_global_scale", divides=True),
    ),
    "compressed-tensors, mxfp4": (
        compressed("mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=32),
        fp4("weight_packed", "", divides=False, group=32),
    ),
    "modelopt nvfp4": (
        {"quant_method": "modelopt", "quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8"},
        fp4("weight", "weight_scale_2", divides=False),
    ),
    "modelopt fp8": (
        {"quant_method": "modelopt", "quant_algo": "FP8"},
        fp8("weight_scale", lambda r, c: (), (10**6, 10**6)),
    ),
}


def quantize(folder: Path, settings: dict[str, Any], writer: Writer) -> dict[str, np.ndarray]:
    """Replace the linear layers of the first decoder layer in ``folder``; what they now stand for."""
    rng = np.random.default_rng(7)
    stored = load_file(folder / FILE)
    meant = {}
    for name in [name for name in stored if ".layers.0." in name and name.endswith("_proj.weight")]:
        out, inputs = stored.pop(name).shape
        tensors, meant[name] = writer(rng, name.removesuffix(".weight"), (out, inputs))
        stored |= tensors
    save_file(stored, folder / FILE, {"format": "pt"})
    edit_config(folder, quantization_config=settings)
    return meant
