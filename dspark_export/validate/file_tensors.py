"""The weights that the files of a checkpoint store, read without the loader: what it misreads or drops shows here.

Plain floats come as they are, GGUF types through gguf's own dequantization, and the published layouts of quantized
safetensors as (code - zero) * scale.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Floats = npt.NDArray[np.float32]
Codes = npt.NDArray[np.integer]
_FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
_PAIRED = ("llama", "arcee", "granite", "smollm3")
"""Architectures whose GGUF files have the two rows of a rotary pair side by side, where transformers has half a head
between them."""

_SMALL = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)
_PLAIN = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class FileTensor:
    """A weight by its name in the file. ``flat``: all but one of its dimensions are 1."""

    name: str
    read: Callable[[], Floats]
    flat: bool = False


def weight_files(source: Path) -> list[Path]:
    """The files with the weights of a checkpoint folder or GGUF file; [] if there are only pickled ones."""
    if source.is_file():
        return [source]
    index, single = source / "model.safetensors.index.json", source / "model.safetensors"
    if index.exists():
        return [source / name for name in sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))]
    return [single] if single.exists() else []


def file_tensors(source: Path) -> list[FileTensor]:
    """Every stored weight of a checkpoint folder or GGUF file."""
    files = weight_files(source)
    if source.is_file():
        return list(_of_gguf(source))
    return list(_Safetensors(files, _quantization(source)).weights())


def _of_gguf(path: Path) -> Iterator[FileTensor]:
    from gguf import GGUFReader, dequantize

    reader = GGUFReader(path)
    arch = reader.fields["general.architecture"].contents()

    def read(tensor: Any) -> Floats:
        shape = [int(size) for size in reversed(tensor.shape)]
        whole = np.asarray(dequantize(tensor.data, tensor.tensor_type), np.float32).reshape(shape)
        pairs = arch in _PAIRED and re.match(r"blk\.\d+\.attn_([qk])\.", tensor.name)
        if not pairs:
            return whole
        name = "head_count" if pairs[1] == "q" else "head_count_kv"
        field = reader.fields.get(f"{arch}.attention.{name}") or reader.fields[f"{arch}.attention.head_count"]
        heads = field.contents()
        return _halves(whole, int(heads[0] if isinstance(heads, list) else heads))

    for tensor in reader.tensors:
        yield FileTensor(tensor.name, partial(read, tensor), _flat(tensor.shape))


def _halves(rows: Floats, heads: int) -> Floats:
    """Rows of each head with the first of all rotary pairs, then the second ones."""
    by_head = rows.reshape(heads, -1, *rows.shape[1:])
    return np.concatenate([by_head[:, 0::2], by_head[:, 1::2]], 1).reshape(rows.shape)


def _flat(shape: Iterable[int]) -> bool:
    return sum(int(size) != 1 for size in shape) < 2


def _quantization(folder: Path) -> dict[str, Any]:
    """The settings of a quantized checkpoint, from its config or a file of their own."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    for place in (config, config.get("text_config") or {}):
        for name in ("quantization_config", "compression_config"):
            if isinstance(place.get(name), dict):
                return dict(place[name])
    own = folder / "quantize_config.json"
    return dict(json.loads(own.read_text("utf-8"))) if own.exists() else {}


class _Safetensors:
    """The weights of safetensors files; names and dtypes say which tensors make one weight."""

    def __init__(self, files: list[Path], settings: dict[str, Any]) -> None:
        from safetensors import safe_open

        opened: list[Any] = [safe_open(file, "pt") for file in files]
        self._files = {name: file for file in opened for name in file.keys()}  # noqa: SIM118  # not a mapping
        self._settings = settings
        self._parts: set[str] = set()

    def weights(self) -> Iterator[FileTensor]:
        """Weights of several tensors first, then the rest."""
        for ending, read in _LAYOUTS.items():
            for name in [name for name in self._files if name.endswith(ending)]:
                stem = name.removesuffix(ending)
                if name not in self._parts and (found := read(self, stem)):
                    yield FileTensor(*found)
        for name in self._files:
            if name not in self._parts and self._dtype(name) in _PLAIN:
                yield FileTensor(name, partial(self._floats, name), _flat(self._shape(name)))

    def _dtype(self, name: str) -> torch.dtype:
        found: torch.dtype = self._files[name].get_slice(name)[:0].dtype if self._shape(name) else self._get(name).dtype
        return found

    def _shape(self, name: str) -> list[int]:
        return list(self._files[name].get_slice(name).get_shape())

    def _get(self, name: str) -> torch.Tensor:
        found: torch.Tensor = self._files[name].get_tensor(name)
        return found

    def _floats(self, name: str) -> Floats:
        found: Floats = self._get(name).float().numpy()
        return found

    def _take(self, *names: str) -> None:
        self._parts.update(name for name in names if name in self._files)

    def packed_words(self, stem: str) -> tuple[str, Callable[[], Floats]] | None:
        """GPTQ (words along the inputs) and AWQ (along the outputs, in the order of its kernels)."""
        words, points, scales, order = (f"{stem}.{part}" for part in ("qweight", "qzeros", "scales", "g_idx"))
        self._take(words, points, scales, order)
        by_inputs = self._shape(words)[1] == self._shape(scales)[1]
        return f"{stem}.weight", partial(self._gptq if by_inputs else self._awq, words, points, scales, order)

    def _gptq(self, words: str, points: str, scales: str, order: str) -> Floats:
        scale = self._floats(scales)
        rows, groups = self._shape(words)[0], scale.shape[0]
        inputs = self._shape(order)[0] if order in self._files else 32 * rows // int(self._settings["bits"])
        bits = 32 * rows // inputs
        codes = _codes(self._get(words).numpy().T, bits)
        zeros = _codes(self._get(points).numpy(), bits)[:, : scale.shape[1]].T
        zeros = zeros + (self._settings.get("checkpoint_format") != "gptq_v2")
        group = self._get(order).numpy() if order in self._files else np.arange(inputs) // -(-inputs // groups)
        return (codes - zeros[:, group]).astype(np.float32) * scale.T[:, group]

    def _awq(self, words: str, points: str, scales: str, _: str) -> Floats:
        scale = self._floats(scales)
        codes, zeros = (
            _codes(self._get(name).numpy(), 4).reshape(-1, scale.shape[1] // 8, 8)[..., _AWQ_ORDER]
            for name in (words, points)
        )
        codes, zeros = codes.reshape(-1, scale.shape[1]), zeros.reshape(-1, scale.shape[1])
        size = len(codes) // len(scale)
        return ((codes - np.repeat(zeros, size, 0)).astype(np.float32) * np.repeat(scale, size, 0)).T

    def packed(self, stem: str) -> tuple[str, Callable[[], Floats]] | None:
        """compressed-tensors: integers in words, or pairs of 4-bit floats in bytes."""
        parts = [f"{stem}_{part}" for part in ("packed", "scale", "shape", "zero_point", "g_idx", "global_scale")]
        self._take(*parts)
        if self._dtype(parts[0]) == torch.uint8:
            return stem, partial(self._pairs, parts[0], parts[1], f"{stem}_global_scale", True)
        return stem, partial(self._integers, stem)

    def _integers(self, stem: str) -> Floats:
        *lead, inputs = (int(size) for size in self._get(f"{stem}_shape"))
        words = self._get(f"{stem}_packed").numpy()
        bits = next(size for size in (8, 4, 2) if -(-inputs * size // 32) == words.shape[-1])
        codes = _codes(words, bits)[..., :inputs] - 2 ** (bits - 1)
        order = self._get(f"{stem}_g_idx").numpy() if f"{stem}_g_idx" in self._files else None
        scale = self._floats(f"{stem}_scale")
        if f"{stem}_zero_point" in self._files:
            zeros = _codes(self._get(f"{stem}_zero_point").numpy().T, bits)[:, : lead[-1]].T - 2 ** (bits - 1)
            codes = codes - self._spread(zeros.astype(np.float32), codes.shape, order)
        whole: Floats = codes.astype(np.float32) * self._spread(scale, codes.shape, order)
        return whole

    def pairs_in_place(self, stem: str) -> tuple[str, Callable[[], Floats]] | None:
        """NVIDIA ModelOpt's NVFP4: pairs of 4-bit floats in the weight itself."""
        self._take(stem, f"{stem}_scale", f"{stem}_scale_2")
        return stem, partial(self._pairs, stem, f"{stem}_scale", f"{stem}_scale_2", False)

    def _pairs(self, pairs: str, scales: str, whole: str, divides: bool) -> Floats:
        values = _fp4(self._get(pairs).numpy())
        scale = self._get(scales)
        wide = np.exp2(scale.numpy().astype(np.float32) - 127) if scale.dtype == torch.uint8 else scale.float().numpy()
        if whole in self._files:
            factor = self._floats(whole)
            wide = wide / factor if divides else wide * factor
        spread: Floats = np.repeat(wide, values.shape[-1] // wide.shape[-1], -1)
        return values * spread

    def blocks(self, stem: str) -> tuple[str, Callable[[], Floats]] | None:
        """MXFP4 experts of gpt-oss: blocks [experts, out, groups, 16], the weight is [experts, in, out]."""
        blocks, scales = f"{stem}_blocks", f"{stem}_scales"
        if scales not in self._files or self._dtype(blocks) != torch.uint8:
            return None
        self._take(blocks, scales)

        def read() -> Floats:
            values = _fp4(self._get(blocks).numpy())
            values = values * np.exp2(self._get(scales).numpy().astype(np.float32) - 127)[..., None]
            return values.reshape(*values.shape[:2], -1).swapaxes(1, 2)

        return stem, read

    def scaled(self, ending: str, stem: str) -> tuple[str, Callable[[], Floats]] | None:
        """Integers or floats of 8 bits with scales beside them."""
        if stem not in self._files or self._dtype(stem) not in _SMALL:
            return None
        self._take(stem, stem + ending, f"{stem}_zero_point", f"{stem}_g_idx")

        def read() -> Floats:
            codes = self._floats(stem)
            order = self._get(f"{stem}_g_idx").numpy() if f"{stem}_g_idx" in self._files else None
            if f"{stem}_zero_point" in self._files:
                codes = codes - self._spread(self._floats(f"{stem}_zero_point"), codes.shape, order)
            return codes * self._spread(self._floats(stem + ending), codes.shape, order)

        return stem, read

    def _spread(self, scale: Floats, shape: tuple[int, ...], order: Codes | None) -> Floats:
        """A scale for every element of ``shape``, or one that broadcasts."""
        if scale.size == 1:
            return scale.reshape(())
        scale = scale[:, None] if scale.ndim == 1 else scale
        if order is not None and (order >= 0).all():
            return scale[..., order]
        block = self._block()
        if block and scale.shape[-2:] != tuple(-(-n // size) for n, size in zip(shape[-2:], block, strict=True)):
            block = None
        for axis in (-2, -1):
            if scale.shape[axis] not in (1, shape[axis]):
                step = block[axis] if block else shape[axis] // scale.shape[axis]
                scale = np.repeat(scale, step, axis).take(range(shape[axis]), axis)
        return scale

    def _block(self) -> list[int] | None:
        """Outputs and inputs that share a scale, where it is for a block of both."""
        groups = (self._settings.get("config_groups") or {}).values()
        declared = [self._settings.get("weight_block_size")]
        declared += [(group.get("weights") or {}).get("block_structure") for group in groups if isinstance(group, dict)]
        found = next((size for size in declared if size), None)
        return [int(n) for n in (found.split("x") if isinstance(found, str) else found)] if found else None


def _codes(words: Codes, bits: int) -> npt.NDArray[np.int32]:
    """Unsigned codes of ``bits`` bits along the last dimension of int32 ``words``, the lowest bits first."""
    octets = np.ascontiguousarray(words).view(np.uint8)
    count = words.shape[-1] * 32 // bits
    single = np.unpackbits(octets, axis=-1, bitorder="little")[..., : count * bits]
    found = np.zeros((*words.shape[:-1], count), np.int32)
    for place in range(bits):
        found |= single[..., place::bits].astype(np.int32) << place
    return found


def _fp4(octets: npt.NDArray[np.uint8]) -> Floats:
    """4-bit floats, two a byte, the lower half first."""
    halves = np.stack([octets & 15, octets >> 4], -1).reshape(*octets.shape[:-1], -1)
    found: Floats = np.where(halves > 7, -1, 1).astype(np.float32) * _FP4[halves & 7]
    return found


_Read = Callable[[_Safetensors, str], "tuple[str, Callable[[], Floats]] | None"]
_LAYOUTS: dict[str, _Read] = {
    ".qweight": _Safetensors.packed_words,
    "_packed": _Safetensors.packed,
    ".weight_scale_2": lambda files, stem: files.pairs_in_place(f"{stem}.weight"),
    "_blocks": _Safetensors.blocks,
    "_scale_inv": lambda files, stem: files.scaled("_scale_inv", stem),
    "_scale": lambda files, stem: files.scaled("_scale", stem),
}
"""Endings that show a quantized weight, and how it is read."""
