"""Sequence kernels: products with constant weights, products of experts, and lookups in a tied embedding.

A product that does not fit keeps its standard form: its weights are not constant, have another rank, or are in blocks
that are not a multiple of 16.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from dspark_export.passes import kernel_layouts as layouts
from dspark_export.passes import match
from dspark_export.passes.kernel_layouts import Layout
from dspark_export.passes.packed_weights import Packed, PackedWeights, packed_value
from dspark_runtime.backends.ort_kernels import DOMAIN

_FLOATS = {ir.DataType.FLOAT: "Float32", ir.DataType.FLOAT16: "Float16", ir.DataType.BFLOAT16: "BFloat16"}
_BLOCKS = {
    ir.DataType.INT8: "Int8",
    ir.DataType.UINT8: "Int8Minimum",
    ir.DataType.INT4: "Int4",
    ir.DataType.UINT4: "Int4Minimum",
}
_MOST_DEPTH_W8A8 = 1 << 16
_EXPERT_LOOP = {"Gather", "Equal", "NonZero", "GatherND", "ScatterND"}


@dataclass(frozen=True)
class _Weight:
    """``kind`` names the format; ``parts`` are initializers with their layouts, the integers or floats first.

    ``points``: zero points of blocks. ``columns``: scales of outputs. Minima of blocks are a third part.
    """

    kind: str
    width: int
    depth: int
    parts: tuple[tuple[ir.Value, Layout], ...]
    points: ir.Value | None = None
    columns: ir.Value | None = None


class KernelProducts(ir.passes.InPlacePass):
    """Rewrites every ``MatMul`` with a constant weight into the product of the weight's format."""

    def __init__(self, weights: PackedWeights) -> None:
        super().__init__()
        self._weights = weights

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Return the same model and whether a product was rewritten."""
        self._graph = model.graph
        self._ranges: dict[str, float] = json.loads(model.metadata_props.get(match.RANGES, "{}"))
        self._heads: list[tuple[_Weight, Packed]] = []
        count = sum(self._product(node) for node in list(model.graph) if node.op_type in ("MatMul", "Gemm"))
        count += sum(self._experts(node) for node in list(model.graph) if node.op_type == "Loop")
        count += sum(self._lookup(node) for node in list(model.graph) if node.op_type == "Gather")
        if count:
            model.opset_imports[DOMAIN] = 1
            match.remove_unused(model)
        return ir.passes.PassResult(model, modified=count > 0)

    def _product(self, node: ir.Node) -> bool:
        if node.op_type == "Gemm" and not _is_linear(node):
            return False
        turned = node.op_type == "Gemm" and bool(node.attributes.get_int("transB", 0))
        weight = weight_behind(node.inputs[1], self._weights, turned)
        packed = None if weight is None else self._packed(weight)
        if weight is None or packed is None:
            return False
        attributes: dict[str, int | float] = {"N": weight.width}
        size = self._ranges.get(str(weight.parts[0][0].name).removesuffix(".weight_q"))
        if weight.kind == "W8A8" and size is not None:
            attributes["range"] = size
        made = ir.node(
            f"Product{weight.kind}",
            [node.inputs[0], *packed],
            attributes=attributes,
            domain=DOMAIN,
            num_outputs=1,
            name=node.name or node.outputs[0].name,
        )
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if bias is None:
            self._replace(node, made, node.outputs[0])
            return True
        made.outputs[0].shape, made.outputs[0].type = node.outputs[0].shape, node.outputs[0].type
        match.insert_before(node, [made])
        self._replace(node, ir.node("Add", [made.outputs[0], bias], num_outputs=1), node.outputs[0])
        return True

    def _packed(self, weight: _Weight) -> list[ir.Value] | None:
        """The packed parts as initializers; None where one of them is in another layout already."""
        made = [self._weights.pack(value, layout) for value, layout in weight.parts]
        if any(packed is None for packed in made):
            return None
        values = [packed_value(self._graph, packed) for packed in made]
        if weight.points is not None:
            values.append(self._minimum(weight))
        if weight.columns is not None:
            values.append(self._column_scales(weight.columns))
        if weight.kind in _FLOATS.values() and made[0] is not None:
            self._heads.append((weight, made[0]))
        return values

    def _minimum(self, weight: _Weight) -> ir.Value:
        """-scale x zero point, in the layout of scales."""
        scale, layout = weight.parts[1]
        name, points, scales = f"{scale.name}.minimum", weight.points.const_value, scale.const_value

        def minimum() -> ir.Tensor[np.ndarray]:
            wide = scales.numpy().astype(np.float32) * points.numpy().astype(np.float32)
            return ir.Tensor(layout.pack(-wide.astype(scales.dtype.numpy())), name=name)

        lazy = ir.LazyTensor(minimum, dtype=scales.dtype, shape=ir.Shape(layout.packed_shape), name=name)
        return match.add_initializer(self._graph, name, lazy)

    def _column_scales(self, scale: ir.Value) -> ir.Value:
        """Scales of outputs [width] as [tiles, 16]."""
        name, scales = f"{scale.name}.tiles", scale.const_value
        tiles = -(-int(scales.shape[0]) // layouts.TILE)

        def padded() -> ir.Tensor[np.ndarray]:
            array = np.zeros(tiles * layouts.TILE, np.float32)
            array[: scales.shape[0]] = scales.numpy()
            return ir.Tensor(array.reshape(tiles, layouts.TILE), name=name)

        lazy = ir.LazyTensor(padded, dtype=ir.DataType.FLOAT, shape=ir.Shape((tiles, layouts.TILE)), name=name)
        return match.add_initializer(self._graph, name, lazy)

    def _experts(self, loop: ir.Node) -> bool:
        body = {node.op_type: node for node in loop.attributes["body"].as_graph()}
        multiplied = body.get("Gemm") or body.get("MatMul")  # matrices [out, in], or [in, out]
        if not set(body) >= _EXPERT_LOOP or multiplied is None:
            return False
        rows, expert = body["GatherND"].inputs[0], body["Equal"].inputs[0]
        weight = _stripped(multiplied.inputs[1].producer().inputs[0])[0]
        if weight is None or weight.const_value is None or weight.dtype not in _FLOATS:
            return False
        turned = multiplied.op_type == "Gemm"
        _, *sides = (int(d) for d in weight.const_value.shape)
        depth, width = reversed(sides) if turned else sides
        stored = self._weights.narrowest(weight.const_value)
        wide = stored != weight.dtype
        packed = self._weights.pack(weight, layouts.tiles_of_floats(depth, width, stored, turned, wide=wide))
        if packed is None:
            return False
        made = ir.node(
            f"Experts{_FLOATS[stored]}",
            [rows, expert, packed_value(self._graph, packed)],
            attributes={"N": width},
            domain=DOMAIN,
            num_outputs=1,
            name=loop.name or loop.outputs[0].name,
        )
        self._replace(loop, made, loop.outputs[0])
        for node in list(loop.attributes["body"].as_graph()):  # what the body reads would count as used
            for index in range(len(node.inputs)):
                node.replace_input_with(index, None)
        return True

    def _lookup(self, gather: ir.Node) -> bool:
        """A table that is the head's weight: rows are read from its tiles. Half precision is widened after lookups."""
        axis = gather.attributes["axis"].as_int() if "axis" in gather.attributes else 0
        table, cast = _stripped(gather.inputs[0])
        if axis or table is None or match.rank(table) != 2 or table.dtype not in _FLOATS:
            return False
        for weight, head in self._heads:
            part, layout = weight.parts[0]
            if _same_numbers(table.const_value, part.const_value):
                self._weights.share(table.const_value, head, _turned(layout))
        packed = self._weights.find(table.const_value)  # of this graph's head, or of one before it
        if packed is not None and packed.layout.transposed:
            kind, layout = _FLOATS[packed.layout.dtype], packed.layout
            made = ir.node(
                f"Lookup{kind}",
                [gather.inputs[1], packed_value(self._graph, packed)],
                attributes={"N": layout.width, **({"K": layout.depth} if kind == "BFloat16" else {})},
                domain=DOMAIN,
                num_outputs=1,
                name=gather.name,
            )
            self._replace(gather, made, gather.outputs[0])
            return True
        if cast is None:
            return False
        found = ir.node("Gather", [table, gather.inputs[1]], attributes={"axis": 0}, num_outputs=1, name=gather.name)
        found.outputs[0].shape, found.outputs[0].type = gather.outputs[0].shape, ir.TensorType(table.dtype)
        match.insert_before(gather, [found])
        made = ir.node("Cast", [found.outputs[0]], attributes={"to": ir.DataType.FLOAT}, num_outputs=1)
        self._replace(gather, made, gather.outputs[0])
        return True

    def _replace(self, old: ir.Node, made: ir.Node, output: ir.Value) -> None:
        made.outputs[0].shape, made.outputs[0].type = output.shape, output.type
        match.insert_before(old, [made])
        match.replace_value(output, made.outputs[0])


def _is_linear(gemm: ir.Node) -> bool:
    """x W + b: nothing is transposed but the weight, nothing scaled."""
    scaled = gemm.attributes.get_float("alpha", 1.0) != 1.0 or gemm.attributes.get_float("beta", 1.0) != 1.0
    return not gemm.attributes.get_int("transA", 0) and not scaled


def weight_behind(value: ir.Value | None, weights: PackedWeights, turned: bool = False) -> _Weight | None:
    """The constant weight [depth, width] that ``value``, or ``value`` ``turned``, is.

    Looks through transposes, casts and dequantization. ``weights`` knows the type that floats are stored in.
    """
    added = match.producer(value, "Add")
    minimum = None if added is None else _spread(added.inputs[1])
    scaled = value if added is None or minimum is None else added.inputs[0]
    dequantize = match.producer(scaled, "DequantizeLinear")
    if dequantize is not None:
        return None if turned else _quantized(dequantize, minimum)
    source, _, also_turned = _path(value)
    turned ^= also_turned
    if source is None or match.rank(source) != 2 or source.dtype not in _FLOATS:
        return None
    rows, columns = (int(d) for d in source.const_value.shape)
    depth, width = (columns, rows) if turned else (rows, columns)
    stored = weights.narrowest(source.const_value)
    layout = layouts.tiles_of_floats(depth, width, stored, turned, wide=stored != source.dtype)
    return _Weight(_FLOATS[stored], width, depth, ((source, layout),))


def _spread(value: ir.Value | None) -> ir.Value | None:
    """Constant minima [blocks, width] after a ``Gather`` that gives every input those of its block."""
    gather = match.producer(value, "Gather")
    source = None if gather is None else gather.inputs[0]
    constant = source is not None and source.is_initializer() and source.const_value is not None
    return source if constant and match.rank(source) == 2 else None


def _quantized(node: ir.Node, minimum: ir.Value | None = None) -> _Weight | None:
    weight, scale = node.inputs[:2]
    points = node.inputs[2] if len(node.inputs) > 2 else None
    constants = [v for v in (weight, scale, points) if v is not None]
    if any(v.const_value is None for v in constants) or match.rank(weight) != 2 or weight.dtype not in _BLOCKS:
        return None
    depth, width = (int(d) for d in weight.const_value.shape)
    if "block_size" not in node.attributes:
        if points is not None or match.rank(scale) != 1 or depth > _MOST_DEPTH_W8A8:
            return None
        parts = ((weight, layouts.tiles_of_columns(depth, width)),)
        return _Weight("W8A8", width, depth, parts, columns=scale)
    block = node.attributes["block_size"].as_int()
    signed = weight.dtype in (ir.DataType.INT8, ir.DataType.INT4)
    lifted = points is not None or minimum is not None
    if block % 16 or depth % block or block > 256 or signed == lifted or (points is not None and minimum is not None):
        return None
    of_blocks = [scale] if minimum is None else [scale, minimum]
    parts = tuple((value, layouts.tiles_of_scales(depth // block, width, value.dtype)) for value in of_blocks)
    integers = (weight, layouts.tiles_of_blocks(depth, width, weight.dtype, block))
    return _Weight(_BLOCKS[weight.dtype], width, depth, (integers, *parts), points)


def _path(value: ir.Value | None) -> tuple[ir.Value | None, ir.Node | None, bool]:
    """The initializer behind ``value``, the last cast on the way, and whether it was transposed."""
    turned, cast = False, None
    while (node := match.producer(value, "Transpose", "Cast")) is not None:
        if node.op_type == "Cast":
            cast = node
        elif list(node.attributes["perm"].as_ints()) == [1, 0]:
            turned = not turned
        else:
            return None, None, False
        value = node.inputs[0]
    constant = value is not None and value.is_initializer() and value.const_value is not None
    return (value, cast, turned) if constant else (None, None, False)


def _stripped(value: ir.Value | None) -> tuple[ir.Value | None, ir.Node | None]:
    source, cast, turned = _path(value)
    return (None, None) if turned else (source, cast)


def _turned(layout: Layout) -> Layout:
    facts = dict(layout.__dict__)
    return Layout(**{**facts, "transposed": not layout.transposed})


def _same_numbers(table: ir.TensorProtocol, head: ir.TensorProtocol) -> bool:
    """Whether ``head`` is ``table`` transposed, or itself, over the same memory."""
    if match.tensor_identity(table) == match.tensor_identity(head):
        return True
    left, right = getattr(table, "raw", None), getattr(head, "raw", None)
    if left is None or right is None or not hasattr(left, "data_ptr") or not hasattr(right, "data_ptr"):
        return False
    turned = right.t()
    return (left.data_ptr(), left.shape, left.stride()) == (turned.data_ptr(), turned.shape, turned.stride())


def left_in_standard_form(graph: ir.Graph) -> Iterator[ir.Node]:
    """Products that no kernel computes."""
    return (node for node in graph if node.op_type in ("MatMul", "Gemm") and node.domain in ("", "ai.onnx"))
