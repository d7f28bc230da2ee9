"""Fold rotate-half rotary embedding into the standard ``RotaryEmbedding``.

Matches ``x * cos + concat(-x2, x1) * sin`` where ``cos`` and ``sin`` are per-position tables [batch, tokens, width]
with both halves equal, and ``concat(x1 * cos - x2 * sin, x2 * cos + x1 * sin)`` where they are one half (gpt-oss). The
tables stay what the model computed (so every kind of rope scaling is covered); the operator reads their first half.
"""

from __future__ import annotations

import onnx_ir as ir

from dspark_export.passes import match


class FoldRotary(ir.passes.InPlacePass):
    """Rewrites rotate-half rotary embedding of 4-D queries and keys [batch, heads, tokens, width]."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Return the same model and whether an embedding was folded."""
        self._halves: dict[tuple[int, int], ir.Value] = {}
        folded = sum(self._fold(model.graph, node) for node in list(model.graph) if node.op_type == "Add")
        folded += sum(_fold_halves(node) for node in list(model.graph) if node.op_type == "Concat")
        if folded:
            match.remove_unused(model)
        return ir.passes.PassResult(model, modified=folded > 0)

    def _fold(self, graph: ir.Graph, add: ir.Node) -> bool:
        for straight, turned in match.operands(add):
            found = _match_product(straight, turned)
            if found is None:
                continue
            x, cos, sin, width = found
            half_cos, half_sin = self._half(graph, cos, width), self._half(graph, sin, width)
            node = ir.node("RotaryEmbedding", [x, half_cos, half_sin], num_outputs=1, name=add.name)
            node.outputs[0].shape, node.outputs[0].type = add.outputs[0].shape, add.outputs[0].type
            match.insert_before(add, [node])
            match.replace_value(add.outputs[0], node.outputs[0])
            return True
        return False

    def _half(self, graph: ir.Graph, table: ir.Value, width: int) -> ir.Value:
        key = (id(table), width)
        if key not in self._halves:
            anchor = table.producer()
            assert anchor is not None
            ends = [match.int64_constant(graph, [v]) for v in (0, width // 2, -1)]
            node = ir.node("Slice", [table, *ends], num_outputs=1)
            if table.shape is not None:
                node.outputs[0].shape = ir.Shape([*list(table.shape)[:-1], width // 2])
            node.outputs[0].type = table.type
            graph.insert_after(anchor, [node])
            self._halves[key] = node.outputs[0]
        return self._halves[key]


def _fold_halves(concat: ir.Node) -> bool:
    """Fold the form in which each half of the result is written out."""
    lower, upper = match.producer(concat.inputs[0], "Sub"), match.producer(concat.inputs[-1], "Add")
    if len(concat.inputs) != 2 or lower is None or upper is None or concat.attributes["axis"].as_int() not in (-1, 3):
        return False
    down = [_half_and_table(value) for value in lower.inputs]
    if any(part is None for part in down):
        return False
    (x1, cos), (x2, sin) = down  # type: ignore[misc]  # none is None
    split = match.producer(x1, "Split")
    x = None if split is None else split.inputs[0]
    if x is None or match.rank(x) != 4 or list(split.outputs) != [x1, x2]:
        return False
    if {_half_and_table(value) for value in upper.inputs} != {(x2, cos), (x1, sin)}:
        return False
    if match.last_dim(cos) != match.last_dim(x1) or match.last_dim(x1) != match.last_dim(x2):
        return False
    node = ir.node("RotaryEmbedding", [x, cos, sin], num_outputs=1, name=concat.name)
    node.outputs[0].shape, node.outputs[0].type = concat.outputs[0].shape, concat.outputs[0].type
    match.insert_before(concat, [node])
    match.replace_value(concat.outputs[0], node.outputs[0])
    return True


def _half_and_table(value: ir.Value | None) -> tuple[ir.Value, ir.Value] | None:
    """(half of x, table [batch, tokens, width / 2]) of a product; the table is behind an ``Unsqueeze``."""
    product = match.producer(value, "Mul")
    for half, spread in () if product is None else match.operands(product):
        node = match.producer(spread, "Unsqueeze")
        if node is not None and node.inputs[0] is not None and match.integers(node.inputs[1]) in ([1], [-3]):
            return half, node.inputs[0]
    return None


def _match_product(straight: ir.Value, turned: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value, int] | None:
    """(x, cos, sin, width) when ``straight + turned`` is a rotary embedding of x."""
    first, second = match.producer(straight, "Mul"), match.producer(turned, "Mul")
    if first is None or second is None:
        return None
    for x, cos in match.operands(first):
        if match.rank(x) != 4:
            continue
        for rotated, sin in match.operands(second):
            width = _rotated_half(rotated, x)
            cos_table, sin_table = _table(cos), _table(sin)
            if width is not None and cos_table is not None and sin_table is not None:
                return x, cos_table, sin_table, width
    return None


def _rotated_half(value: ir.Value, x: ir.Value) -> int | None:
    """Width of x when ``value`` is concat(-x[half:], x[:half]) along the last axis."""
    concat = match.producer(value, "Concat")
    width = match.last_dim(x)
    if concat is None or width is None or len(concat.inputs) != 2:
        return None
    negated = match.producer(concat.inputs[0], "Neg")
    if negated is None or concat.attributes["axis"].as_int() not in (-1, 3):
        return None
    upper, lower = _halves_of(negated.inputs[0], x, width), _halves_of(concat.inputs[1], x, width)
    return width if (upper, lower) == ("upper", "lower") else None


def _halves_of(value: ir.Value | None, x: ir.Value, width: int) -> str | None:
    node = match.producer(value, "Slice", "Split")
    if node is None or node.inputs[0] is not x:
        return None
    if node.op_type == "Split":
        return ("lower", "upper")[node.outputs.index(value)] if len(node.outputs) == 2 else None
    start, end = match.integers(node.inputs[1]), match.integers(node.inputs[2])
    axes = match.integers(node.inputs[3]) if len(node.inputs) > 3 else None
    if start is None or end is None or axes not in ([-1], [3]):
        return None
    if start == [0] and end == [width // 2]:
        return "lower"
    return "upper" if start == [width // 2] and end[0] >= width else None


def _table(value: ir.Value) -> ir.Value | None:
    """The [batch, tokens, width] table behind an ``Unsqueeze`` on the head axis, if its halves are equal."""
    node = match.producer(value, "Unsqueeze")
    if node is None or match.integers(node.inputs[1]) not in ([1], [-3]):
        return None
    table = node.inputs[0]
    return table if table is not None and _equal_halves(table) else None


def _equal_halves(value: ir.Value) -> bool:
    """Follows element-wise operators back to ``Concat(f, f)``."""
    node = value.producer()
    while node is not None and node.op_type in ("Cos", "Sin", "Cast", "Mul", "Identity"):
        variable = [i for i in node.inputs if i is not None and match.scalar(i) is None]
        if len(variable) != 1:
            return False
        node = variable[0].producer()
    return node is not None and node.op_type == "Concat" and len(node.inputs) == 2 and node.inputs[0] is node.inputs[1]
