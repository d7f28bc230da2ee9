"""Puts the tensors of a GGUF file into a transformers model: which goes where, and how it is turned around.

llama.cpp stores some weights differently: rotary dimensions interleaved, norms plus one, experts as one block each for
gate and up. Names come from gguf's own table. Nothing is left to chance: a weight of the model without a tensor, a
tensor without a weight and a wrong shape are errors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from dspark_export.checkpoints.gguf_blocks import grid_of
from dspark_export.checkpoints.gguf_families import Family, Shapes
from dspark_export.checkpoints.gguf_rope import ROPE_FREQS, ROPE_LONG, ROPE_SHORT
from dspark_export.checkpoints.inventory import Inventory, generic, some
from dspark_export.grids import Grid, NotHeld
from dspark_runtime.errors import InvalidWeights

if TYPE_CHECKING:
    import torch
    from gguf import GGUFReader
    from transformers import PretrainedConfig

Weight = npt.NDArray[np.float32]
Number = TypeVar("Number", bound=np.generic)
_FLOATS = ("F32", "F16", "BF16", "F64")
_MEDIA = re.compile(r"^(v|mm|a)\.")
_OLD_EXPERTS = re.compile(r"^blk\.(\d+)\.ffn_(gate|down|up)\.\d+\.weight$")


@dataclass(frozen=True)
class Slot:
    """One weight of the model: its name and shape, and the tensors it is made of (none: zeros)."""

    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """Where every weight of the model comes from, and what of the file is not used, with the reason."""

    slots: tuple[Slot, ...]
    unread: dict[str, str]


def plan_weights(family: Family, architecture: str, config: PretrainedConfig, stored: Shapes, file: str) -> Plan:
    """Match the model that ``config`` describes with the tensors of ``file``.

    Raises InvalidWeights for weights without a tensor, tensors without a weight, and shapes that do not agree.
    """
    inventory = Inventory(stored)
    names = _Names(family, architecture, config, stored)
    slots, missing = [], []
    for name, shape in _weights_of(config):
        sources = names.sources(name)
        if sources is None:
            missing.append(name)
            continue
        inventory.take(*sources)
        slots.append(Slot(name, shape, sources))
    inventory.take(*(name for name in (ROPE_FREQS, ROPE_LONG, ROPE_SHORT) if "rope" in names.settings))
    for name in inventory.left:
        if _MEDIA.match(name):
            inventory.excuse(name, "reads images or sound; the bundle takes text only")
        elif ".attn_rot_embd" in name:
            inventory.excuse(name, "rotary frequencies, which follow from the settings")
    if missing:
        raise InvalidWeights(
            f"{file} lacks {len(missing)} weights of {config.model_type}, e.g. {some(missing)}; download it again"
        )
    inventory.close(file, "tensors", "use the model's safetensors checkpoint")
    for slot in slots:
        _check_shape(slot, stored, family, file)
    return Plan(tuple(slots), inventory.unread)


def _weights_of(config: PretrainedConfig) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a model's weights, each storage once."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tied = set(model.all_tied_weights_keys) if config.get_text_config().tie_word_embeddings else set()
    return [(name, tuple(value.shape)) for name, value in model.state_dict().items() if name not in tied]


class _Names:
    """From transformers' name of a weight to the tensors of the file."""

    def __init__(self, family: Family, architecture: str, config: PretrainedConfig, stored: Shapes) -> None:
        from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

        kinds = {name: kind for kind, name in MODEL_ARCH_NAMES.items()}
        self._table = get_tensor_name_map(kinds[architecture], config.num_hidden_layers)
        self._family, self._stored = family, stored
        self.settings = ("rope",) if getattr(config, "rope_parameters", None) else ()

    def sources(self, name: str) -> tuple[str, ...] | None:
        """Tensors that ``name`` is made of, () for a bias of zeros, None if the file has none."""
        for ending, parts in self._family.names.items():
            if name.endswith(ending):
                prefix = f"blk.{name.split('.')[2]}." if ".layers." in name else ""
                found = [part for stem in parts for part in self._stacked(prefix + stem)]
                return tuple(found) if all(part in self._stored for part in found) and found else None
        stem, _, suffix = name.rpartition(".")
        base = self._table.get_name(stem)
        if base is None:
            return None
        tensor = f"{base}.{suffix}"
        if tensor in self._stored:
            return (tensor,)
        return () if suffix == "bias" and not self._in_other_layers(tensor) else None

    def _in_other_layers(self, tensor: str) -> bool:
        return generic(tensor) in {generic(name) for name in self._stored}

    def _stacked(self, tensor: str) -> list[str]:
        """``tensor``, or one tensor for each expert, as older files have them."""
        if tensor in self._stored:
            return [tensor]
        stem = tensor.replace("_exps.weight", "")
        single = [name for name in self._stored if _OLD_EXPERTS.match(name) and name.startswith(f"{stem}.")]
        return sorted(single, key=lambda name: int(name.split(".")[3])) or [tensor]


def _check_shape(slot: Slot, stored: Shapes, family: Family, file: str) -> None:
    if not slot.sources:
        return
    shapes = [stored[name] for name in slot.sources]
    total = sum(int(np.prod(shape)) for shape in shapes)
    turned = shapes[0][::-1] if slot.sources[0].endswith(family.transposed or ("\0",)) else shapes[0]
    alike = len(shapes) > 1 or turned == slot.shape or (np.prod(turned) == np.prod(slot.shape) and 1 in slot.shape)
    if total != int(np.prod(slot.shape)) or not alike:
        raise InvalidWeights(
            f"{file}: {slot.sources[0]!r} has shape {list(shapes[0])}, the settings ask for {list(slot.shape)} "
            f"({slot.name}); download it again"
        )


def load_weights(
    plan: Plan, reader: GGUFReader, family: Family, config: PretrainedConfig, dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of the model in ``dtype``, one after the other; only one is held in float32."""
    import torch

    tensors = {tensor.name: tensor for tensor in reader.tensors}
    for slot in plan.slots:
        if not slot.sources:
            yield slot.name, torch.zeros(slot.shape, dtype=dtype)
            continue
        parts = [_restored(name, _dequantized(tensors[name]), family, config) for name in slot.sources]
        whole = _joined(parts, slot)
        yield slot.name, torch.from_numpy(np.array(whole.reshape(slot.shape), dtype=np.float32)).to(dtype)


def grids(plan: Plan, reader: GGUFReader, family: Family, config: PretrainedConfig) -> dict[str, Callable[[], Grid]]:
    """What reads the integers of every weight that is stored as such, by transformers' names."""
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    quantized = [
        slot for slot in plan.slots if slot.sources and tensors[slot.sources[0]].tensor_type.name not in _FLOATS
    ]
    return {slot.name: partial(_grid, slot, tensors, family, config) for slot in quantized}


def _grid(slot: Slot, tensors: dict[str, Any], family: Family, config: PretrainedConfig) -> Grid:
    if len(slot.sources) > 1 or len(slot.shape) != 2:
        raise NotHeld("the experts of a mixture are read one at a time, from floats")
    (name,) = slot.sources
    tensor = tensors[name]
    inputs, out = (int(size) for size in tensor.shape)
    found = grid_of(tensor.tensor_type.name, np.asarray(tensor.data, np.uint8), (out, inputs))
    heads = _heads(name, family, config)
    if heads is None:
        return found
    parts = (found.codes, found.scale, found.zero, found.minimum)
    return Grid(*(None if part is None else _halves(part, heads) for part in parts))  # type: ignore[arg-type]


def _dequantized(tensor: Any) -> Weight:
    from gguf import dequantize

    whole: Weight = dequantize(tensor.data, tensor.tensor_type)
    return whole.reshape([int(dim) for dim in reversed(tensor.shape)])


def _joined(parts: list[Weight], slot: Slot) -> Weight:
    """Experts: gate above up, for each of them."""
    if len(parts) == 1:
        return parts[0]
    if parts[0].ndim == 2:  # one tensor per expert: all gates, then all ups
        parts = _stack(parts, slot.shape[0])
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)


def _stack(parts: list[Weight], experts: int) -> list[Weight]:
    return [np.stack(parts[begin : begin + experts]) for begin in range(0, len(parts), experts)]


def _restored(name: str, weight: Weight, family: Family, config: PretrainedConfig) -> Weight:
    """A tensor as transformers keeps it."""
    kind = re.sub(r"^blk\.\d+\.", "", name)
    if family.norm_plus_one and kind.endswith("norm.weight"):
        return weight - np.float32(1)
    if kind in family.transposed:
        return weight.T
    heads = _heads(name, family, config)
    return weight if heads is None else _halves(weight, heads)


def _heads(name: str, family: Family, config: PretrainedConfig) -> int | None:
    """How many heads' rotary dimensions a tensor holds interleaved; None where it holds none."""
    kind = re.sub(r"^blk\.\d+\.", "", name)
    if not family.interleaved or not kind.startswith(("attn_q.", "attn_k.")):
        return None
    return int(config.num_attention_heads if kind.startswith("attn_q.") else config.num_key_value_heads)


def _halves(weight: npt.NDArray[Number], heads: int) -> npt.NDArray[Number]:
    """Rotary pairs from neighbours to the halves of a head."""
    rows = weight.shape[0]
    return weight.reshape(heads, rows // heads // 2, 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
