"""Fold the six operators of a root-mean-square norm into the standard ``RMSNormalization``.

Matches ``w * cast(x / sqrt(mean(x^2) + eps))`` in the spellings that PyTorch modules trace to: the reciprocal root as
``Reciprocal(Sqrt)``, ``Pow(-0.5)`` or a division, the square as ``Pow(2)`` or ``x * x``, casts to float32 around it,
a weight of ``w`` or ``1 + w`` (Gemma), or no weight at all.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from dspark_export.passes import match


class FoldRmsNorm(ir.passes.InPlacePass):
    """Rewrites every decomposed RMS norm over the last axis."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Return the same model and whether a norm was folded."""
        folded = 0
        for node in list(model.graph):
            if node.op_type == "ReduceMean" and _fold(model.graph, node):
                folded += 1
        if folded:
            match.remove_unused(model)
        return ir.passes.PassResult(model, modified=folded > 0)


def _fold(graph: ir.Graph, mean: ir.Node) -> bool:
    squared = match.producer(mean.inputs[0], "Pow", "Mul")
    if squared is None:
        return False
    x = squared.inputs[0]
    if x is None:
        return False
    is_square = match.scalar(squared.inputs[1]) == 2.0 if squared.op_type == "Pow" else squared.inputs[1] is x
    axes = match.integers(mean.inputs[1]) if len(mean.inputs) > 1 else None
    width = match.last_dim(x)
    if not is_square or not match.is_last_axis(axes, x) or width is None:
        return False
    plus_eps = match.only_consumer(mean.outputs[0], "Add")
    if plus_eps is None:
        return False
    epsilon = match.scalar(match.other_operand(plus_eps, mean.outputs[0]))
    normed = _reciprocal_root_times(plus_eps, x)
    if epsilon is None or normed is None:
        return False

    output = normed.outputs[0]
    inner, working_dtype = x, x.dtype
    cast = match.only_consumer(output, "Cast")
    source = match.producer(x, "Cast")
    stored_dtype = None
    if source is not None and cast is not None and source.inputs[0] is not None:
        stored_dtype = source.inputs[0].dtype
    scale, product = None, None
    # Weight multiplied after the cast back (Llama), or before it, in float32 (Gemma).
    for candidate in ([cast.outputs[0]] if cast is not None else []) + [output]:
        times = match.only_consumer(candidate, "Mul")
        if times is None:
            continue
        other = match.other_operand(times, candidate)
        if other is not None and _is_weight(other, width):
            scale, product = other, times
            if candidate is not output:
                inner = source.inputs[0] if source is not None and stored_dtype == cast_type(cast) else inner
            break
    if product is None or scale is None:
        one = np.ones(width, dtype=(working_dtype or ir.DataType.FLOAT).numpy())
        scale = match.add_initializer(graph, f"ones_{width}_{one.dtype}", ir.tensor(one))
        target, anchor = output, normed
    else:
        target, anchor = product.outputs[0], product
    if scale.dtype != inner.dtype and inner is not x:
        inner = x
        if scale.dtype != x.dtype:
            return False
    if scale.dtype != inner.dtype:
        return False
    new = ir.node(
        "RMSNormalization", [inner, scale], attributes={"axis": -1, "epsilon": epsilon}, num_outputs=1, name=anchor.name
    )
    new.outputs[0].shape, new.outputs[0].type = target.shape, target.type
    match.insert_before(anchor, [new])
    match.replace_value(target, new.outputs[0])
    return True


def cast_type(node: ir.Node | None) -> ir.DataType | None:
    """Target type of a ``Cast`` node."""
    return None if node is None else ir.DataType(node.attributes["to"].as_int())


def _reciprocal_root_times(plus_eps: ir.Node, x: ir.Value) -> ir.Node | None:
    """The node computing x / sqrt(variance), whichever way it is spelled."""
    value = plus_eps.outputs[0]
    power = match.only_consumer(value, "Pow")
    if power is not None and match.scalar(power.inputs[1]) == -0.5:
        reciprocal = power.outputs[0]
    else:
        root = match.only_consumer(value, "Sqrt")
        if root is None:
            return None
        division = match.only_consumer(root.outputs[0], "Div")
        if division is not None and division.inputs[0] is x:
            return division
        if division is not None and match.scalar(division.inputs[0]) == 1.0:
            reciprocal = division.outputs[0]
        else:
            inverse = match.only_consumer(root.outputs[0], "Reciprocal")
            if inverse is None:
                return None
            reciprocal = inverse.outputs[0]
    times = match.only_consumer(reciprocal, "Mul")
    return times if times is not None and match.other_operand(times, reciprocal) is x else None


def _is_weight(value: ir.Value, width: int) -> bool:
    """A vector of the norm's width that does not depend on the input: an initializer, or 1 + initializer."""
    if value.is_initializer():
        return value.shape is not None and list(value.shape) == [width]
    node = match.producer(value, "Add", "Cast")
    if node is None:
        return False
    return all(
        operand is not None and (match.scalar(operand) is not None or _is_weight(operand, width))
        for operand in node.inputs
    )
