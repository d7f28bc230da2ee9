"""ONNX Runtime CPU: products of 8-bit weights with one scale per output become integer products.

The standard graph expands such weights and multiplies in floats. Here every row of the activations is rounded to 8 bits
by its own largest magnitude, the product is of integers, and both scales are applied after:

    s = max(|x|) over the row;   x W  ~  (round(127 x / s) Wq) * (scale / 127) * s

Where the graph says how large the rows in front of a product get (:data:`dspark_export.passes.match.RANGES`), that is s
for all of them, and part of the weight's scale; larger numbers are clipped to it.

Integer sums do not depend on the order: a row's product does not depend on how many rows are with it. Weights
keep to 63 steps (see quantize_weights), so that pairs of products fit the 16 bits in which processors without VNNI add
them. A row of zeros, which has no largest magnitude to divide by, becomes any integers times a scale of 0.
"""

from __future__ import annotations

import json

import numpy as np
import onnx_ir as ir

from dspark_export.passes import match

DOMAIN = "com.microsoft"
STEPS = 127
_MIDDLE = np.uint8(128)  # activations are unsigned: ONNX Runtime has fast kernels for unsigned times signed
_ONE, _NONE = np.float32(1), np.int8(0)


class OrtCpuIntegerProducts(ir.passes.InPlacePass):
    """Rewrites ``MatMul(x, DequantizeLinear(int8 weight, scale per output))``."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Return the same model and whether a product was rewritten."""
        self._graph = model.graph
        self._ranges: dict[str, float] = json.loads(model.metadata_props.get(match.RANGES, "{}"))
        self._rounded: dict[ir.Value, tuple[ir.Value, ir.Value | float]] = {}
        count = sum(self._rewrite(node) for node in list(model.graph) if node.op_type == "MatMul")
        if count:
            model.opset_imports[DOMAIN] = 1
            match.remove_unused(model)
        return ir.passes.PassResult(model, modified=count > 0)

    def _rewrite(self, product: ir.Node) -> bool:
        x, found = product.inputs[0], _weight_and_scale(product)
        if x is None or found is None:
            return False
        weight, scale = found
        rounded, largest = self._round(x, product, self._ranges.get(str(weight.name).removesuffix(".weight_q")))
        one, middle, zero = (self._constant(scalar) for scalar in (_ONE, _MIDDLE, _NONE))
        name = product.name or product.outputs[0].name or "product"
        integers = ir.node(
            "MatMulIntegerToFloat",
            [rounded, weight, one, self._scale(scale, largest), middle, zero],
            domain=DOMAIN,
            num_outputs=1,
            name=f"{name}/integers",
        )
        nodes = [integers]
        if isinstance(largest, ir.Value):
            nodes.append(ir.node("Mul", [integers.outputs[0], largest], num_outputs=1, name=f"{name}/scaled"))
        out = product.outputs[0]
        for node in nodes:
            node.outputs[0].shape, node.outputs[0].type = out.shape, out.type
        match.insert_before(product, nodes)
        match.replace_value(out, nodes[-1].outputs[0])
        return True

    def _round(self, x: ir.Value, reader: ir.Node, size: float | None) -> tuple[ir.Value, ir.Value | float]:
        """``x`` as unsigned 8-bit numbers around 128, and its rows' largest magnitudes or the ``size`` of all of them;
        once for all that read it."""
        if x not in self._rounded:
            self._rounded[x] = self._by_row(x, reader) if size is None else (self._integers(x, size, x, reader), size)
        return self._rounded[x]

    def _by_row(self, x: ir.Value, reader: ir.Node) -> tuple[ir.Value, ir.Value]:
        name = f"{x.name}/rounded"
        magnitudes = ir.node("Abs", [x], num_outputs=1, name=f"{name}/Abs")
        largest = ir.node(
            "ReduceMax",
            [magnitudes.outputs[0], match.int64_constant(self._graph, [-1])],
            attributes={"keepdims": 1},
            num_outputs=1,
            name=f"{name}/ReduceMax",
        )
        shares = ir.node("Div", [x, largest.outputs[0]], num_outputs=1, name=f"{name}/Div")
        nodes = [magnitudes, largest, shares]
        for node in nodes:
            node.outputs[0].shape, node.outputs[0].type = x.shape, x.type
        largest.outputs[0].shape = None if x.shape is None else ir.Shape([*list(x.shape)[:-1], 1])
        match.insert_before(reader, nodes)
        return self._integers(shares.outputs[0], 1.0, x, reader), largest.outputs[0]

    def _integers(self, numbers: ir.Value, size: float, x: ir.Value, reader: ir.Node) -> ir.Value:
        """``numbers`` in steps of which ``size`` has 127."""
        node = ir.node(
            "QuantizeLinear",
            [numbers, self._constant(np.float32(size / STEPS)), self._constant(_MIDDLE)],
            num_outputs=1,
            name=f"{x.name}/rounded/QuantizeLinear",
        )
        node.outputs[0].shape, node.outputs[0].type = x.shape, ir.TensorType(ir.DataType.UINT8)
        match.insert_before(reader, [node])
        return node.outputs[0]

    def _scale(self, scale: ir.Value, largest: ir.Value | float) -> ir.Value:
        """Scales of weights, times the step of activations as far as it is known."""
        tensor = scale.const_value
        assert tensor is not None
        known = not isinstance(largest, ir.Value)
        step = np.float32((largest if known else 1.0) / STEPS)
        name = f"{scale.name}.{'ranged' if known else 'of'}_{STEPS}"

        def multiplied() -> ir.Tensor[np.ndarray]:
            return ir.Tensor(tensor.numpy().astype(np.float32) * step, name=name)

        lazy = ir.LazyTensor(multiplied, dtype=ir.DataType.FLOAT, shape=ir.Shape(tensor.shape), name=name)
        return match.add_initializer(self._graph, name, lazy)

    def _constant(self, scalar: np.generic) -> ir.Value:
        """A shared scalar with a name that says its content."""
        name = f"{scalar.dtype}_{scalar}".replace("-", "m").replace(".", "_")
        return match.add_initializer(self._graph, name, ir.tensor(np.asarray(scalar), name=name))


def has_integer_products(model: ir.Model) -> bool:
    """Whether a product of the graph is one this pass rewrites."""
    return any(node.op_type == "MatMul" and _weight_and_scale(node) is not None for node in model.graph)


def _weight_and_scale(product: ir.Node) -> tuple[ir.Value, ir.Value] | None:
    """8-bit weight [in, out] and scale [out] of a product, else None."""
    dequantize = match.producer(product.inputs[1], "DequantizeLinear")
    if dequantize is None or "block_size" in dequantize.attributes or len(dequantize.inputs) != 2:
        return None
    weight, scale = dequantize.inputs
    if weight is None or scale is None or weight.dtype != ir.DataType.INT8 or scale.const_value is None:
        return None
    return (weight, scale) if (match.rank(weight), match.rank(scale)) == (2, 1) else None
