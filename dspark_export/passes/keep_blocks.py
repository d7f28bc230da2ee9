"""Stores weights as the integers that the checkpoint has: nothing is rounded anew.

Products read them through a blocked ``DequantizeLinear``, as in quantize_weights. A minimum that is not a multiple of
its scale (Q4_1, Q4_K) is added after it:

    W = DequantizeLinear(codes, scale) + Gather(minimum, block of each input)

The sequence kernels have products for that form. What no form holds exactly stays in floats.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import ml_dtypes
import numpy as np
import onnx_ir as ir

from dspark_export.grids import Form
from dspark_export.passes import match
from dspark_export.passes.kept_weights import KeptWeights
from dspark_export.passes.quantize_weights import BlockQuantization, QuantizeWeights, weight_of

MINIMUM = "/Minimum"
"""Ending of the name of the node that adds minima."""

_NARROW = {ir.DataType.INT4: ml_dtypes.int4, ir.DataType.UINT4: ml_dtypes.uint4}


class KeepBlocks(QuantizeWeights):
    """Like :class:`QuantizeWeights`, with the integers of ``kept`` in place of rounded ones."""

    def __init__(self, kept: KeptWeights, *, head: bool = True, embedding: bool = True) -> None:
        super().__init__(BlockQuantization(8, None, head=head, embedding=embedding))
        self._weights = kept

    def _quantize_product(self, graph: ir.Graph, node: ir.Node) -> None:
        weight, transposed = weight_of(node)
        if weight is None or weight.const_value is None or match.rank(weight) != 2:
            return
        source, tensor = str(weight.name), weight.const_value
        form = self._form_of(source, tensor, transposed)
        if form is None:
            self.skipped.append(source)
            return
        depth, width = (int(d) for d in (reversed(tensor.shape) if transposed else tensor.shape))
        name = f"{source}.T" if transposed else source
        parts = {
            suffix: match.add_initializer(graph, f"{name}.{suffix}", self._lazily(source, name, suffix, form, shape))
            for suffix, shape in _shapes(form, depth, width).items()
        }
        minimum = parts.pop("weight_minimum", None)
        dequantize = ir.node(
            "DequantizeLinear",
            list(parts.values()),
            attributes={"axis": 0, "block_size": form.block},
            num_outputs=1,
            name=self._name(f"{name}/DequantizeLinear"),
        )
        nodes = [dequantize]
        if minimum is not None:
            nodes += self._add(graph, name, dequantize.outputs[0], minimum, 0, depth, form.block)
        for made in nodes:
            made.outputs[0].shape, made.outputs[0].type = ir.Shape((depth, width)), ir.TensorType(ir.DataType.FLOAT)
        match.insert_before(node, nodes)
        node.replace_input_with(1, nodes[-1].outputs[0])
        self._weights.keep(source)
        self.quantized.append(name)

    def _quantize_embedding(self, graph: ir.Graph, node: ir.Node) -> None:
        table, ids = node.inputs
        if table is None or ids is None or not table.is_initializer() or match.rank(table) != 2:
            return
        tensor, source = table.const_value, str(table.name)
        if node.attributes.get_int("axis", 0) or not tensor.dtype.is_floating_point():
            return
        form = self._form_of(source, tensor, True)
        if form is None:
            return
        rows, width = (int(d) for d in tensor.shape)
        wide = replace(form, dtype="INT8" if form.dtype.startswith("I") else "UINT8")
        name, axis = f"{source}.rows", len(ids.shape)
        gathered = {}
        for suffix, shape in _shapes(wide, width, rows).items():
            part = self._lazily(source, name, suffix, wide, shape[::-1], by_row=True)
            value = match.add_initializer(graph, f"{name}.{suffix}", part)
            gather = ir.node("Gather", [value, ids], num_outputs=1, name=self._name(f"{source}.{suffix}/Gather"))
            gather.outputs[0].shape = ir.Shape([*list(ids.shape), shape[0]])
            gather.outputs[0].type = ir.TensorType(part.dtype)
            gathered[suffix] = gather
        inputs = [gather.outputs[0] for suffix, gather in gathered.items() if suffix != "weight_minimum"]
        dequantize = ir.node(
            "DequantizeLinear",
            inputs,
            attributes={"axis": axis, "block_size": form.block},
            num_outputs=1,
            name=self._name(f"{source}/DequantizeLinear"),
        )
        nodes = [*gathered.values(), dequantize]
        if form.minimum:
            minimum = gathered["weight_minimum"].outputs[0]
            nodes += self._add(graph, source, dequantize.outputs[0], minimum, axis, width, form.block)
        match.insert_before(node, nodes)
        match.replace_value(node.outputs[0], nodes[-1].outputs[0])
        self._weights.keep(source)
        self.quantized.append(name)

    def _form_of(self, name: str, tensor: ir.TensorProtocol, transposed: bool) -> Form | None:
        """None where the integers under this name are not this weight's: a draft may have a weight of the same name."""
        form = self._weights.form(name)
        if form is None:
            return None
        array = tensor.numpy()
        return form if self._weights.holds(name, array if transposed else array.T) else None

    def _lazily(
        self, source: str, name: str, suffix: str, form: Form, shape: Iterable[int], by_row: bool = False
    ) -> ir.LazyTensor:
        """One part of a weight, read from the checkpoint when it is written; turned to [in, out] unless ``by_row``."""
        dtype = ir.DataType[form.dtype] if suffix in ("weight_q", "weight_zero_point") else ir.DataType.FLOAT
        full = f"{name}.{suffix}"

        def evaluate() -> ir.Tensor[np.ndarray]:
            part = self._weights.grid(source).stored(form)[suffix]
            array = np.ascontiguousarray(part if by_row else part.T)
            return ir.Tensor(array.astype(_NARROW.get(dtype, array.dtype)), dtype=dtype, name=full)

        return ir.LazyTensor(evaluate, dtype=dtype, shape=ir.Shape(tuple(shape)), name=full)

    def _add(
        self, graph: ir.Graph, name: str, scaled: ir.Value, minimum: ir.Value, axis: int, inputs: int, block: int
    ) -> list[ir.Node]:
        places = np.arange(inputs, dtype=np.int64) // block
        index = match.add_initializer(graph, f"blocks_of_{block}_in_{inputs}", ir.tensor(places))
        spread = ir.node(
            "Gather", [minimum, index], attributes={"axis": axis}, num_outputs=1, name=self._name(f"{name}/Minima")
        )
        return [spread, ir.node("Add", [scaled, spread.outputs[0]], num_outputs=1, name=self._name(f"{name}{MINIMUM}"))]


def _shapes(form: Form, depth: int, width: int) -> dict[str, tuple[int, int]]:
    """Shapes [in, out] and [blocks, out] of the parts of a weight, in the input order of ``DequantizeLinear``."""
    blocks = (depth // form.block, width)
    shapes = {"weight_q": (depth, width), "weight_scale": blocks}
    if form.points:
        shapes["weight_zero_point"] = blocks
    if form.minimum:
        shapes["weight_minimum"] = blocks
    return shapes
