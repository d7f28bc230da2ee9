"""Which weights the tensors of a quantized checkpoint stand for: from names, shapes and dtypes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from dspark_export.checkpoints.quantized import grids, layouts
from dspark_export.checkpoints.quantized.methods import Settings, check_method, groups_of
from dspark_export.checkpoints.recipes import Found, Recipe, Recipes, open_tensors
from dspark_runtime.errors import InvalidWeights

_GPTQ_BITS = (2, 3, 4, 8)
_SMALL = ("I8", "F8_E4M3", "F8_E5M2")
_ACTIVATIONS = re.compile(
    r"\.(input_scale|input_zero_point|input_global_scale|activation_scale|output_scale|input_scale_ub)$"
)
_OF_ACTIVATIONS = "the scale of quantized activations; the bundle does not quantize them so"


def plan(found: Found, settings: Settings, name: str) -> Recipes:
    """A recipe for every weight; tensors of no known layout stay as they are, for others to judge.

    Raises UnsupportedArchitecture for methods and variants that are not read, InvalidWeights for tensors that do not
    fit together.
    """
    method = check_method(settings, name)
    planner = _Planner(found, settings, name)
    weights: dict[str, Recipe] = {}
    for tensor in found:
        for ending, read in _LAYOUTS[method].items():
            if tensor.endswith(ending) and (made := read(planner, tensor.removesuffix(ending))):
                weights[made[0]] = made[1]
    if not weights:
        raise InvalidWeights(
            f"{name} declares weights quantized by {method}, and stores none of that layout; if they are plain floats, "
            "remove quantization_config from its config"
        )
    used = {part for recipe in weights.values() for part in recipe.parts.values()} | planner.consumed
    excused = {tensor: _OF_ACTIVATIONS for tensor in found if tensor not in used and _ACTIVATIONS.search(tensor)}
    rest = {
        tensor: Recipe(stored.shape, {"weight": tensor})
        for tensor, (_, stored) in found.items()
        if tensor not in used and tensor not in excused
    }
    if twice := sorted(set(rest) & set(weights)):
        raise InvalidWeights(f"{name} stores {twice[0]!r} both quantized and as it is; remove one")
    return Recipes({**rest, **weights}, excused)


Made = tuple[str, Recipe] | None


class _Planner:
    """Reads layouts; a stem is the name of a tensor without its ending."""

    def __init__(self, found: Found, settings: Settings, name: str) -> None:
        self.found, self.settings, self.name = found, settings, name
        self.consumed: set[str] = set()

    def _parts(self, stem: str, needed: Mapping[str, str], optional: Mapping[str, str]) -> dict[str, str]:
        if missing := [stem + ending for ending in needed.values() if stem + ending not in self.found]:
            raise InvalidWeights(f"{self.name} lacks {missing[0]!r}, a part of a quantized weight; download it again")
        there = {role: stem + ending for role, ending in optional.items() if stem + ending in self.found}
        return {role: stem + ending for role, ending in needed.items()} | there

    def _shape(self, tensor: str) -> tuple[int, ...]:
        return self.found[tensor][1].shape

    def _dtype(self, tensor: str) -> str:
        return self.found[tensor][1].dtype

    def _require(self, holds: bool, tensor: str, what: str) -> None:
        if not holds:
            shape, dtype = list(self._shape(tensor)), self._dtype(tensor)
            raise InvalidWeights(
                f"{self.name}: {tensor!r} is {dtype} {shape}, {what}; is its quantization_config right?"
            )

    def gptq(self, stem: str) -> Made:
        """Bits are those of the settings where the shapes allow it: layers may have others."""
        parts = self._parts(
            stem, {"qweight": ".qweight", "qzeros": ".qzeros", "scales": ".scales"}, {"g_idx": ".g_idx"}
        )
        (rows, out), (groups, columns) = self._shape(parts["qweight"]), self._shape(parts["scales"])
        self._require(columns == out, parts["scales"], f"and the weight has {out} outputs")
        order = self._shape(parts["g_idx"]) if "g_idx" in parts else None
        words = self._shape(parts["qzeros"])[1]
        possible = [
            bits
            for bits in _GPTQ_BITS
            if math.ceil(out * bits / 32) == words and rows * 32 % bits == 0 and order in (None, (rows * 32 // bits,))
        ]
        declared = self.settings.get("bits")
        self._require(bool(possible), parts["qzeros"], f"with {rows} x {out} words of codes and g_idx {order}")
        bits = declared if declared in possible else possible[0]
        inputs = rows * 32 // bits
        self._require(groups <= inputs, parts["scales"], f"more groups than the {inputs} inputs")
        offset = 0 if self.settings.get("checkpoint_format") == "gptq_v2" else 1
        make, grid = (partial(to.gptq, bits=bits, zero_offset=offset) for to in (layouts, grids))
        return f"{stem}.weight", Recipe((out, inputs), parts, make, grid)

    def awq(self, stem: str) -> Made:
        parts = self._parts(stem, {"qweight": ".qweight", "qzeros": ".qzeros", "scales": ".scales"}, {})
        inputs, words = self._shape(parts["qweight"])
        groups, out = self._shape(parts["scales"])
        self._require(words * 8 == out and inputs % groups == 0, parts["qweight"], "which is not AWQ's gemm layout")
        self._require(self._shape(parts["qzeros"]) == (groups, words), parts["qzeros"], f"expected {[groups, words]}")
        return f"{stem}.weight", Recipe((out, inputs), parts, layouts.awq, grids.awq)

    def scaled(self, stem: str, scale: str) -> Made:
        """``stem`` is the weight itself."""
        if stem not in self.found or self._dtype(stem) == "U8":
            return None
        self._require(
            self._dtype(stem) in _SMALL, stem, "not compressed, although it has a scale (quantization_status?)"
        )
        parts = {"weight": stem, "scale": stem + scale}
        parts |= {role: f"{stem}_{role}" for role in ("zero_point", "g_idx") if f"{stem}_{role}" in self.found}
        shape, scales, block = self._shape(stem), self._shape(parts["scale"]), self._block()
        if not (block and scales[-2:] == tuple(math.ceil(n / size) for n, size in zip(shape[-2:], block, strict=True))):
            block = None
        self._require(block is not None or _fits(scales, shape), parts["scale"], f"for a weight {list(shape)}")
        grid = partial(grids.scaled, block=block) if self._dtype(stem) == "I8" else None
        return stem, Recipe(shape, parts, partial(layouts.scaled, block=block), grid)

    def _block(self) -> tuple[int, int] | None:
        sizes = {tuple(size) for size in [self.settings.get("weight_block_size")] if size}
        for group in groups_of(self.settings):
            if size := (group.get("weights") or {}).get("block_structure"):
                sizes.add(tuple(int(part) for part in (size.split("x") if isinstance(size, str) else size)))
        if len(sizes) > 1:
            raise InvalidWeights(f"{self.name}: its quantization_config has blocks of several sizes ({sorted(sizes)})")
        return next(iter(sizes), None)

    def packed(self, stem: str) -> Made:
        """compressed-tensors: integers in words, or two 4-bit floats a byte."""
        if self._dtype(f"{stem}.weight_packed") == "U8":
            return self._packed_fp4(stem)
        needed = {"packed": ".weight_packed", "scale": ".weight_scale"}
        parts = self._parts(stem, needed, {"zero_point": ".weight_zero_point", "g_idx": ".weight_g_idx"})
        of_shape = self._parts(stem, {"shape": ".weight_shape"}, {})["shape"]
        shape = tuple(int(size) for size in open_tensors(self.found, [of_shape])[of_shape][...])
        self.consumed.add(of_shape)
        words = self._shape(parts["packed"])[-1]
        sizes = [(group.get("weights") or {}).get("num_bits") for group in groups_of(self.settings)]
        declared = sorted({size for size in sizes if isinstance(size, int)})
        bits = [size for size in declared if math.ceil(shape[-1] * size / 32) == words]
        self._require(len(bits) == 1, parts["packed"], f"not {list(shape)} in {declared} bits")
        self._require(_fits(self._shape(parts["scale"]), shape), parts["scale"], f"for a weight {list(shape)}")
        make, grid = (partial(to.packed_integers, bits=bits[0], shape=shape) for to in (layouts, grids))
        return f"{stem}.weight", Recipe(shape, parts, make, grid)

    def _packed_fp4(self, stem: str) -> Made:
        needed = {"packed": ".weight_packed", "scale": ".weight_scale"}
        parts = self._parts(stem, needed, {"divisor": ".weight_global_scale"})
        return f"{stem}.weight", self._fp4(parts)

    def modelopt_fp4(self, stem: str) -> Made:
        """NVIDIA ModelOpt's NVFP4: two values a byte in ``weight`` itself."""
        if f"{stem}.weight" not in self.found or self._dtype(f"{stem}.weight") != "U8":
            return None
        needed = {"packed": ".weight", "scale": ".weight_scale", "multiplier": ".weight_scale_2"}
        return f"{stem}.weight", self._fp4(self._parts(stem, needed, {}))

    def _fp4(self, parts: dict[str, str]) -> Recipe:
        *lead, half = self._shape(parts["packed"])
        groups = self._shape(parts["scale"])[-1]
        group = 2 * half // groups
        kind = self._dtype(parts["scale"])
        self._require((kind, group) in (("F8_E4M3", 16), ("U8", 32)), parts["scale"], f"a scale for {group} inputs")
        make, grid = (partial(to.packed_fp4, group=group) for to in (layouts, grids))
        return Recipe((*lead, 2 * half), parts, make, grid)

    def mxfp4(self, stem: str) -> Made:
        parts = self._parts(stem, {"blocks": "_blocks", "scales": "_scales"}, {})
        experts, out, groups, half = self._shape(parts["blocks"])
        self._require(self._shape(parts["scales"]) == (experts, out, groups), parts["scales"], "one for each block")
        return stem, Recipe((experts, groups * half * 2, out), parts, layouts.mxfp4_experts)


def _fits(scale: tuple[int, ...], weight: tuple[int, ...]) -> bool:
    """Whether there is a scale for the tensor, each channel, or each group of inputs of a channel."""
    if math.prod(scale) == 1:
        return True
    if len(scale) == 1:
        return scale[0] == weight[-2]
    same = len(scale) == len(weight) and scale[:-2] == weight[:-2]
    return same and scale[-2] in (1, weight[-2]) and weight[-1] % scale[-1] == 0


Reads = Callable[[_Planner, str], Made]
_INVERSE: dict[str, Reads] = {"_scale_inv": lambda planner, stem: planner.scaled(stem, "_scale_inv")}
_SCALED: dict[str, Reads] = {**_INVERSE, "_scale": lambda planner, stem: planner.scaled(stem, "_scale")}
_LAYOUTS: dict[str, dict[str, Any]] = {
    "awq": {".qweight": _Planner.awq},
    "compressed-tensors": {**_SCALED, ".weight_packed": _Planner.packed},
    "fbgemm-fp8": _SCALED,
    "fp8": _SCALED,
    "gptq": {".qweight": _Planner.gptq},
    "modelopt": {**_SCALED, ".weight_scale_2": _Planner.modelopt_fp4},
    "mxfp4": {"_blocks": _Planner.mxfp4},
}
"""By method: endings that show a quantized weight, and how to read it."""
