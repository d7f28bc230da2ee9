"""Drop operators that change nothing: identities, casts to the same type, full-range slices, transposes that cancel."""

from __future__ import annotations

import onnx_ir as ir

from dspark_export.passes import match

_TO_THE_END = 2**31 - 1


class DropNoops(ir.passes.InPlacePass):
    """Removes nodes whose output always equals their input."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Return the same model and whether a node was dropped."""
        dropped = 0
        for node in list(model.graph):
            source = _same_as_input(node)
            if source is None or (node.outputs[0].is_graph_output() and _is_boundary(source)):
                continue
            match.replace_value(node.outputs[0], source)
            dropped += 1
        if dropped:
            match.remove_unused(model)
        return ir.passes.PassResult(model, modified=dropped > 0)


def _is_boundary(value: ir.Value) -> bool:
    """A graph input or output keeps its own name and cannot take another's."""
    return value.producer() is None or value.is_graph_output()


def _same_as_input(node: ir.Node) -> ir.Value | None:
    """The value a no-op node hands through, or None when the node does something."""
    if node.domain not in ("", "ai.onnx") or not node.inputs or node.inputs[0] is None:
        return None
    x = node.inputs[0]
    rule = _RULES.get(node.op_type)
    return rule(node, x) if rule is not None else None


def _identity(node: ir.Node, x: ir.Value) -> ir.Value | None:
    return x


def _cast(node: ir.Node, x: ir.Value) -> ir.Value | None:
    return x if x.dtype is not None and x.dtype == ir.DataType(node.attributes["to"].as_int()) else None


def _slice(node: ir.Node, x: ir.Value) -> ir.Value | None:
    starts, ends = match.integers(node.inputs[1]), match.integers(node.inputs[2])
    steps = match.integers(node.inputs[4]) if len(node.inputs) > 4 else [1] * len(starts or [])
    if starts is None or ends is None or steps is None or any(starts) or any(s != 1 for s in steps):
        return None
    axes = match.integers(node.inputs[3]) if len(node.inputs) > 3 else list(range(len(starts)))
    if axes is None:
        return None
    for axis, end in zip(axes, ends, strict=True):
        dim = x.shape[axis] if x.shape is not None else None
        if end < _TO_THE_END and not (isinstance(dim, int) and end >= dim):
            return None
    return x


def _transpose(node: ir.Node, x: ir.Value) -> ir.Value | None:
    perm = node.attributes.get("perm")
    if perm is None:
        return None
    order = list(perm.as_ints())
    if order == sorted(order):
        return x
    before = match.producer(x, "Transpose")
    if before is None or "perm" not in before.attributes:
        return None
    first = list(before.attributes["perm"].as_ints())
    return before.inputs[0] if [first[i] for i in order] == sorted(order) else None


def _reshape(node: ir.Node, x: ir.Value) -> ir.Value | None:
    before, after = x.shape, node.outputs[0].shape
    if before is None or after is None or len(before) != len(after):
        return None
    same = [a == b and (isinstance(a, int) or a.value is not None) for a, b in zip(before, after, strict=True)]
    return x if all(same) else None


def _expand(node: ir.Node, x: ir.Value) -> ir.Value | None:
    return _reshape(node, x)


_RULES = {
    "Identity": _identity,
    "Cast": _cast,
    "Slice": _slice,
    "Transpose": _transpose,
    "Reshape": _reshape,
    "Expand": _expand,
}
