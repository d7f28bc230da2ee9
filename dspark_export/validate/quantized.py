"""The PyTorch model with the weights a quantized bundle really holds, so that its graphs can be compared tightly."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from dspark_export.passes import match
from dspark_export.passes.keep_blocks import MINIMUM
from dspark_export.passes.match import SMOOTHED
from dspark_export.passes.pack_projections import GROUPS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SUFFIX = "/DequantizeLinear"
Tensor = npt.NDArray[Any]


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight that is stored as integers. ``table``: rows of it are looked up; else a product reads it [in, out].

    ``parts``: names of the initializers it is made of.
    """

    name: str
    table: bool
    weights: ir.Value
    scale: ir.Value
    zero: ir.Value | None
    minimum: ir.Value | None
    axis: int
    block: int

    @property
    def parts(self) -> tuple[str, ...]:
        there = (self.weights, self.scale, self.zero, self.minimum)
        return tuple(str(value.name) for value in there if value is not None)

    @property
    def shape(self) -> tuple[int, ...]:
        assert self.weights.const_value is not None
        return tuple(self.weights.const_value.shape.numpy())

    def wide(self) -> Tensor:
        """The float32 numbers that it stands for."""
        zero = None if self.zero is None else _numbers(self.zero)
        wide = dequantized(_numbers(self.weights), _numbers(self.scale), zero, self.axis, self.block)
        if self.minimum is not None:
            wide += np.repeat(_numbers(self.minimum).astype(np.float32), self.block, self.axis)
        return wide

    def steps(self) -> Tensor:
        """How far apart the numbers are that each element can be."""
        ones = np.ones(self.shape, np.float32)
        return np.abs(dequantized(ones, _numbers(self.scale), None, self.axis, self.block))


def find_quantized(graph: ir.Model) -> Iterator[QuantizedWeight]:
    """Every weight that ``graph`` stores as integers."""
    for node in graph.graph:
        if node.op_type != "DequantizeLinear":
            continue
        table = all(v is None or v.producer() is not None for v in node.inputs)
        sources = [_source(value) for value in node.inputs]
        if len(sources) < 2 or sources[0] is None or sources[1] is None:
            continue
        yield QuantizedWeight(
            (node.name or "").removesuffix(SUFFIX),
            table,
            sources[0],
            sources[1],
            sources[2] if len(sources) > 2 else None,
            _minimum(node),
            1 if table else node.attributes["axis"].as_int(),
            node.attributes.get_int("block_size", 0),
        )


def quantized_weights(graph: ir.Model) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What quantized tensors stand for, in float32, by name: weights [in, out] of products, and tables."""
    products: dict[str, Tensor] = {}
    tables: dict[str, Tensor] = {}
    for found in find_quantized(graph):
        (tables if found.table else products)[found.name] = found.wide()
    return products, tables


def _minimum(node: ir.Node) -> ir.Value | None:
    """What is added to the blocks of ``node``, in the shape of their scales."""
    added = match.only_consumer(node.outputs[0], "Add")
    if added is None or not (added.name or "").partition(MINIMUM)[1]:
        return None
    gather = match.producer(added.inputs[1], "Gather")
    return None if gather is None else _source(gather.inputs[0])


def _source(value: ir.Value | None) -> ir.Value | None:
    """The initializer that ``value`` is, or the table that rows of it are looked up in."""
    if value is None:
        return None
    node = value.producer()
    if node is not None and node.op_type == "Gather":
        value = node.inputs[0]
    return None if value is None or value.const_value is None else value


def _numbers(value: ir.Value) -> Tensor:
    assert value.const_value is not None
    found: Tensor = value.const_value.numpy()
    return found


def dequantized(weights: Tensor, scale: Tensor, zero: Tensor | None, axis: int, block: int) -> Tensor:
    """What DequantizeLinear gives for blocks of ``block`` along ``axis``, in float32; 0: for one scale an index."""
    wide: Tensor = weights.astype(np.float32)
    if not block:
        scales: Tensor = np.expand_dims(scale.astype(np.float32), [i for i in range(wide.ndim) if i != axis])
        return wide * scales

    def spread(values: Tensor) -> Tensor:
        return np.repeat(values.astype(np.float32), block, axis).take(range(wide.shape[axis]), axis)

    return (wide - (0.0 if zero is None else spread(zero))) * spread(scale)


@torch.no_grad()
def put_into(model: PreTrainedModel, graph: ir.Model) -> list[str]:
    """Replace weights of ``model``, which is in float32, by those of ``graph``; returns names it has no weight for.

    So are the gains of the norms whose channels were smoothed: the weights after them have taken over their size.
    """
    products, tables = quantized_weights(graph)
    for gain in json.loads(graph.metadata_props.get(SMOOTHED, "[]")):
        value, module = graph.graph.initializers.get(gain), _module(model, gain)
        if module is not None and value is not None and value.const_value is not None:
            module.weight.copy_(torch.from_numpy(value.const_value.numpy()))
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    if head.weight is table.weight:
        head.weight = torch.nn.Parameter(table.weight.detach().clone(), requires_grad=False)
    unknown = []
    for name, rows in tables.items():
        owner = _module(model, name)
        if owner is head or owner is None:  # tied tables go by the head's name
            owner = table
        if owner.weight.shape == rows.shape:
            owner.weight.copy_(torch.from_numpy(rows))
        else:
            unknown.append(name)
    for name, wide in products.items():
        for part, columns in _unpacked(model, name.removesuffix(".T"), wide):
            owner = head if part.startswith("lm_head.") else _module(model, part)
            if owner is None:
                unknown.append(part)
            elif type(owner).__name__ == "Conv1D":  # GPT-2 keeps [in, out]
                owner.weight.copy_(torch.from_numpy(columns))
            else:
                owner.weight.copy_(torch.from_numpy(columns.T))
    return unknown


def _unpacked(model: PreTrainedModel, name: str, wide: Tensor) -> list[tuple[str, Tensor]]:
    """The weight under ``name``, or the parts that were packed into it."""
    for packed, parts in GROUPS.items():
        if f".{packed}." not in name or _module(model, name) is not None:
            continue
        names = [name.replace(f".{packed}.", f".{part}.") for part in parts]
        modules = [_module(model, part) for part in names]
        if any(module is None for module in modules):
            break
        sizes = [int(module.weight.shape[0]) for module in modules if module is not None]
        cuts = np.cumsum(sizes)[:-1]
        return list(zip(names, np.split(wide, cuts, axis=1), strict=True))
    return [(name, wide)]


def _module(model: PreTrainedModel, weight: str) -> Any:
    try:
        return model.get_submodule(weight.removesuffix(".weight"))
    except AttributeError:
        return None
