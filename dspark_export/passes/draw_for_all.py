"""Engines only: a block drafter draws for every sequence, and greedy ones ignore what was drawn.

The graph of a block drafter lists the sequences with a temperature above 0 and works on those alone. TensorRT does not
compile tensors whose size depends on data. This pass draws for all sequences, at temperature 1 where theirs is 0, and
replaces the scatter of drawn tokens among the most likely ones by a choice on the temperature. ``draft_probs`` gets a
row for every sequence; the runtime drops those of greedy ones.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from dspark_export.passes import match
from dspark_runtime.bundle.draft_contract import DRAFT_PROBS, TEMPERATURE

_SAME_INDICES = ("Transpose", "Gather", "Reshape", "Unsqueeze", "Expand", "Identity")
_DRAWN = ("drawn", "u0")


class DrawForAll(ir.passes.InPlacePass):
    """Removes the list of drawing sequences and every tensor of its length."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Return the same model and whether it chose sequences by their temperature."""
        graph = model.graph
        source = next((value for value in graph.inputs if value.name == TEMPERATURE), None)
        chosen = [node for node in graph if node.op_type == "NonZero"] if source is not None else []
        for node in chosen:
            _replace(graph, source, node)
        if chosen:
            _rename_drawn(graph)
            match.remove_unused(model)
        return ir.passes.PassResult(model, modified=bool(chosen))


def _replace(graph: ir.Graph, temperature: ir.Value, nonzero: ir.Node) -> None:
    draws = nonzero.inputs[0]
    indices = _derived(nonzero.outputs[0])
    one = match.add_initializer(graph, "float32_1", ir.tensor(np.ones((), np.float32)))
    heat = ir.node("Where", [draws, temperature, one], num_outputs=1, name=f"{TEMPERATURE}/divisor")
    heat.outputs[0].name, heat.outputs[0].type, heat.outputs[0].shape = heat.name, temperature.type, temperature.shape
    match.insert_before(nonzero, [heat])
    for node in list(graph):
        if node.op_type == "Gather" and node.inputs[1] in indices and node.inputs[0] not in indices:
            whole = heat.outputs[0] if node.inputs[0] is temperature else node.inputs[0]
            match.replace_value(node.outputs[0], whole)
        elif node.op_type == "ScatterElements" and node.inputs[1] in indices:
            _choose(graph, node, draws)


def _derived(indices: ir.Value) -> set[ir.Value]:
    """``indices`` and what is only another shape of them."""
    found, open_values = {indices}, [indices]
    while open_values:
        for use in open_values.pop().uses():
            if use.idx == 0 and use.node.op_type in _SAME_INDICES:
                made = use.node.outputs[0]
                if made not in found:
                    found.add(made)
                    open_values.append(made)
    return found


def _choose(graph: ir.Graph, scatter: ir.Node, draws: ir.Value) -> None:
    """``Where(draws, drawn, most_likely)``: the rows of all sequences are in order, so nothing has to be scattered."""
    most_likely, _, drawn = scatter.inputs
    axes = match.int64_constant(graph, range(1, match.rank(most_likely)))
    wide = ir.node("Unsqueeze", [draws, axes], num_outputs=1, name=f"{scatter.name}/draws")
    pick = ir.node("Where", [wide.outputs[0], drawn, most_likely], num_outputs=1, name=f"{scatter.name}/pick")
    wide.outputs[0].name, wide.outputs[0].type = wide.name, ir.TensorType(ir.DataType.BOOL)
    pick.outputs[0].name, pick.outputs[0].type, pick.outputs[0].shape = pick.name, most_likely.type, most_likely.shape
    match.insert_before(scatter, [wide, pick])
    match.replace_value(scatter.outputs[0], pick.outputs[0])


def _rename_drawn(graph: ir.Graph) -> None:
    for value in (*graph.outputs, *(value for node in graph for value in node.outputs)):
        if value.shape is None:
            continue
        names = [dim.value if isinstance(dim, ir.SymbolicDim) else None for dim in value.shape]
        if value.name == DRAFT_PROBS or set(names) & set(_DRAWN):
            first = [ir.SymbolicDim("batch") if i == 0 else dim for i, dim in enumerate(value.shape)]
            value.shape = ir.Shape(first)
