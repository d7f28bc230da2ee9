"""Sequence kernels: norms, gates and activations, which work row by row with one code path."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from dspark_export.passes import match
from dspark_runtime.backends.ort_kernels import DOMAIN


class KernelRows(ir.passes.InPlacePass):
    """Rewrites norms over the last axis, gated activations and the activations that are left."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Return the same model and whether a node was rewritten."""
        self._graph = model.graph
        count = 0
        rules: dict[str, Callable[[ir.Node], bool]] = {
            "RMSNormalization": self._rms_norm,
            "LayerNormalization": self._layer_norm,
            "Mul": self._softcap,
        }
        for op_type, rule in rules.items():
            count += sum(rule(node) for node in list(model.graph) if _is(node, op_type))
        count += sum(self._gelu_tanh(node) for node in list(model.graph) if _is(node, "Tanh"))
        for node in [n for n in model.graph if _is(n, "Sigmoid", "Gelu")]:
            count += self._activation(node)
        for node in [n for n in model.graph if _is(n, "Sigmoid", "Tanh")]:
            count += self._plain(node)
        if count:
            model.opset_imports[DOMAIN] = 1
            model.graph.sort()  # a gain may be computed after the sum that its norm reads
            match.remove_unused(model)
        return ir.passes.PassResult(model, modified=count > 0)

    def _rms_norm(self, norm: ir.Node) -> bool:
        x, weight = norm.inputs[:2]
        if not _over_last_axis(norm, x) or not _is_vector(weight, match.last_dim(x)):
            return False
        epsilon = norm.attributes["epsilon"].as_float() if "epsilon" in norm.attributes else 1e-5
        add = match.producer(x, "Add")
        if add is not None and _same_shape(add.inputs):
            made = self._node("SkipRMSNorm", [*add.inputs, weight], norm, outputs=2, epsilon=epsilon)
            normed, total = made.outputs
            for new, old in ((normed, norm.outputs[0]), (total, add.outputs[0])):
                new.shape, new.type = old.shape, old.type
            match.insert_before(add, [made])
            match.replace_value(add.outputs[0], total)
            match.replace_value(norm.outputs[0], normed)
            return True
        self._swap(norm.outputs[0], self._node("RMSNorm", [x, weight], norm, epsilon=epsilon), norm)
        return True

    def _layer_norm(self, norm: ir.Node) -> bool:
        x, weight = norm.inputs[:2]
        bias = norm.inputs[2] if len(norm.inputs) > 2 else None
        width = match.last_dim(x)
        if not _over_last_axis(norm, x) or not _is_vector(weight, width) or len(norm.outputs) > 1:
            return False
        if bias is None:
            name = f"zeros_{width}"
            bias = match.add_initializer(self._graph, name, ir.tensor(np.zeros(width, np.float32), name=name))
        epsilon = norm.attributes["epsilon"].as_float() if "epsilon" in norm.attributes else 1e-5
        self._swap(norm.outputs[0], self._node("LayerNorm", [x, weight, bias], norm, epsilon=epsilon), norm)
        return True

    def _activation(self, node: ir.Node) -> bool:
        """act(gate) * up, or act(x) where nothing is gated."""
        x = node.inputs[0]
        if not _is_float(x):
            return False
        kind, out = _activation_of(node)
        times = match.only_consumer(out, "Mul")
        up = match.other_operand(times, out) if times is not None else None
        if kind != "Sigmoid" and up is not None and up is not x and _same_shape((x, up)):
            split = match.producer(x, "Split")
            halves = split is not None and list(split.outputs) == [x, up] and match.last_dim(x) == match.last_dim(up)
            axis = split.attributes["axis"].as_int() if halves and "axis" in split.attributes else 0
            if halves and axis in (-1, match.rank(x) - 1):
                made = self._node(f"{kind}Gate", [split.inputs[0]], times)
            else:
                made = self._node(f"{kind}Product", [x, up], times)
            self._swap(times.outputs[0], made, times)
            return True
        if kind == "Sigmoid":
            return False
        self._swap(out, self._node(kind, [x], node), out.producer())
        return True

    def _plain(self, node: ir.Node) -> bool:
        if not _is_float(node.inputs[0]) or not list(node.outputs[0].uses()):
            return False
        self._swap(node.outputs[0], self._node(node.op_type, [node.inputs[0]], node), node)
        return True

    def _softcap(self, product: ir.Node) -> bool:
        """cap * tanh(x / cap)"""
        for value, other in match.operands(product):
            tanh, cap = match.producer(value, "Tanh"), match.scalar(other)
            divided = match.producer(tanh.inputs[0], "Div") if tanh is not None else None
            if cap is not None and divided is not None and match.scalar(divided.inputs[1]) == cap:
                made = self._node("Softcap", [divided.inputs[0]], product, cap=cap)
                self._swap(product.outputs[0], made, product)
                return True
        return False

    def _gelu_tanh(self, tanh: ir.Node) -> bool:
        """x / 2 * (1 + tanh(a * (x + b * x ** 3))), as GPT-2 spells it, becomes ``Gelu``: a kernel like any other."""
        inner = match.producer(tanh.inputs[0], "Mul")
        plus_one = match.only_consumer(tanh.outputs[0], "Add")
        product = match.only_consumer(plus_one.outputs[0], "Mul") if plus_one is not None else None
        half = match.producer(match.other_operand(product, plus_one.outputs[0]), "Mul") if product is not None else None
        if inner is None or half is None or match.scalar(match.other_operand(plus_one, tanh.outputs[0])) != 1.0:
            return False
        for x, factor in match.operands(half):
            if match.scalar(factor) == 0.5 and _is_cubic(inner, x):
                gelu = ir.node("Gelu", [x], attributes={"approximate": "tanh"}, num_outputs=1, name=product.name)
                self._swap(product.outputs[0], gelu, product)
                return True
        return False

    def _node(
        self, op_type: str, inputs: list[ir.Value], named: ir.Node, outputs: int = 1, **attributes: float
    ) -> ir.Node:
        return ir.node(
            op_type,
            inputs,
            attributes=attributes,
            domain=DOMAIN,
            num_outputs=outputs,
            name=named.name or named.outputs[0].name,
        )

    def _swap(self, old: ir.Value, made: ir.Node, anchor: ir.Node) -> None:
        made.outputs[0].shape, made.outputs[0].type = old.shape, old.type
        match.insert_before(anchor, [made])
        match.replace_value(old, made.outputs[0])


def _is_cubic(product: ir.Node, x: ir.Value) -> bool:
    """Whether ``product`` is sqrt(2 / pi) * (x + 0.044715 * x ** 3)."""
    for total, outer in match.operands(product):
        add = match.producer(total, "Add")
        if add is None or not math.isclose(match.scalar(outer) or 0.0, math.sqrt(2 / math.pi), rel_tol=1e-6):
            continue
        times = match.producer(match.other_operand(add, x), "Mul")
        for cube, inner in match.operands(times) if times is not None else ():
            power = match.producer(cube, "Pow")
            cubed = power is not None and power.inputs[0] is x and match.scalar(power.inputs[1]) == 3.0
            if cubed and math.isclose(match.scalar(inner) or 0.0, 0.044715, rel_tol=1e-6):
                return True
    return False


def _activation_of(node: ir.Node) -> tuple[str, ir.Value]:
    """Name and result of the activation that ``node`` is, or is the sigmoid of."""
    if node.op_type == "Gelu":
        tanh = "approximate" in node.attributes and node.attributes["approximate"].as_string() == "tanh"
        return ("GeluTanh" if tanh else "Gelu"), node.outputs[0]
    x, sigmoid = node.inputs[0], node.outputs[0]
    times = match.only_consumer(sigmoid, "Mul")
    if times is not None and match.other_operand(times, sigmoid) is x:
        return "Silu", times.outputs[0]
    return "Sigmoid", sigmoid


def _is(node: ir.Node, *op_types: str) -> bool:
    return node.op_type in op_types and node.domain in ("", "ai.onnx")


def _is_float(value: ir.Value | None) -> bool:
    return value is not None and value.dtype == ir.DataType.FLOAT


def _over_last_axis(norm: ir.Node, x: ir.Value) -> bool:
    axis = norm.attributes["axis"].as_int() if "axis" in norm.attributes else -1
    return _is_float(x) and match.last_dim(x) is not None and match.is_last_axis([axis], x)


def _is_vector(value: ir.Value | None, width: int | None) -> bool:
    return value is not None and value.shape is not None and list(value.shape) == [width] and _is_float(value)


def _same_shape(values: tuple[ir.Value | None, ...]) -> bool:
    shapes = [None if v is None or v.shape is None else [str(d) for d in v.shape] for v in values]
    return None not in shapes and shapes[0] == shapes[1] and not any(v.is_initializer() for v in values if v)
