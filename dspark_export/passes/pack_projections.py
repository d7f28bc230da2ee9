"""Pack projections that read the same activations (query, key and value; gate and up) into one matrix product.

Small products read the same activations; one product with the weights side by side and a ``Split`` after it
does the same work in one launch. The packed weight is concatenated when it is written, never held beside its parts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from dspark_export.passes import match

GROUPS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


class PackProjections(ir.passes.InPlacePass):
    """Packs the named ``groups`` of projections of every layer where all members read the same value.

    ``alike`` says of weights, by name, whether they may be packed; None: always.
    """

    def __init__(
        self,
        groups: tuple[str, ...] = ("qkv_proj", "gate_up_proj"),
        alike: Callable[[Sequence[str]], bool] | None = None,
    ) -> None:
        super().__init__()
        self._groups, self._alike = groups, alike

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Return the same model and whether a group was packed."""
        packed = 0
        for name in self._groups:
            parts = GROUPS[name]
            for first in [n for n in model.graph if n.op_type == "MatMul" and _weight_name(n, parts[0])]:
                members = _siblings(first, parts)
                if members is not None and self._may_pack(members):
                    _pack(model.graph, members, parts[0], name)
                    packed += 1
        if packed:
            match.remove_unused(model)
        return ir.passes.PassResult(model, modified=packed > 0)

    def _may_pack(self, members: list[ir.Node]) -> bool:
        return self._alike is None or self._alike([str(node.inputs[1].name) for node in members if node.inputs[1]])


def _weight_name(node: ir.Node, part: str) -> str | None:
    weight = node.inputs[1]
    if weight is None or not weight.is_initializer() or weight.name is None:
        return None
    return weight.name if f".{part}." in weight.name and len(list(weight.uses())) == 1 else None


def _siblings(first: ir.Node, parts: tuple[str, ...]) -> list[ir.Node] | None:
    """The projections named ``parts`` of one module that read one value, in that order."""
    x = first.inputs[0]
    if x is None:
        return None
    prefix = (_weight_name(first, parts[0]) or "").split(f".{parts[0]}.")[0]
    found = [first]
    for part in parts[1:]:
        for use in x.uses():
            name = _weight_name(use.node, part) if use.node.op_type == "MatMul" else None
            if name is not None and name.split(f".{part}.")[0] == prefix:
                found.append(use.node)
                break
    if len(found) != len(parts) or any(n.outputs[0].is_graph_output() for n in found):
        return None
    biased = [_bias(n) is not None for n in found]
    return found if all(biased) or not any(biased) else None


def _bias(node: ir.Node) -> ir.Node | None:
    add = match.only_consumer(node.outputs[0], "Add")
    if add is None:
        return None
    other = match.other_operand(add, node.outputs[0])
    return add if other is not None and other.is_initializer() and match.rank(other) == 1 else None


def _joined(values: list[ir.Value], axis: int, name: str) -> ir.LazyTensor:
    tensors = [v.const_value for v in values]
    shape = [int(d) for d in tensors[0].shape]
    shape[axis] = int(np.sum([t.shape[axis] for t in tensors]))

    def concatenate() -> ir.Tensor[np.ndarray]:
        return ir.Tensor(np.concatenate([t.numpy() for t in tensors], axis=axis), dtype=tensors[0].dtype, name=name)

    return ir.LazyTensor(concatenate, dtype=tensors[0].dtype, shape=ir.Shape(shape), name=name)


def _pack(graph: ir.Graph, group: list[ir.Node], part: str, packed_name: str) -> None:
    weights = [n.inputs[1] for n in group]
    name = weights[0].name.replace(f".{part}.", f".{packed_name}.")
    packed = match.add_initializer(graph, name, _joined(weights, 1, name))
    widths = [int(w.const_value.shape[1]) for w in weights]
    product = ir.node("MatMul", [group[0].inputs[0], packed], num_outputs=1, name=f"{name}/MatMul")
    biases = [_bias(n) for n in group]
    nodes, ends = [product], group
    if all(b is not None for b in biases):
        ends = biases
        vectors = [match.other_operand(b, n.outputs[0]) for b, n in zip(biases, group, strict=True)]
        bias_name = vectors[0].name.replace(f".{part}.", f".{packed_name}.")
        bias = match.add_initializer(graph, bias_name, _joined(vectors, 0, bias_name))
        nodes.append(ir.node("Add", [product.outputs[0], bias], num_outputs=1, name=f"{name}/Add"))
    split = ir.node(
        "Split",
        [nodes[-1].outputs[0], match.int64_constant(graph, widths)],
        attributes={"axis": -1},
        num_outputs=len(group),
        name=f"{name}/Split",
    )
    leading = list(group[0].outputs[0].shape)[:-1]
    for node in nodes:
        node.outputs[0].shape = ir.Shape([*leading, sum(widths)])
        node.outputs[0].type = group[0].outputs[0].type
    for old, new in zip(ends, split.outputs, strict=True):
        new.shape, new.type = old.outputs[0].shape, old.outputs[0].type
    match.insert_before(group[0], [*nodes, split])
    for old, new in zip(ends, split.outputs, strict=True):
        match.replace_value(old.outputs[0], new)
