"""Engines only: the loop over chosen experts becomes one batched product over gathered matrices.

TensorRT has no operator whose output shape depends on data inside a loop, and none that lists distinct values. So every
row gets a copy of its expert's matrix. For the few rows of a verify pass that reads what the loop would read; for a
prefill chunk it costs ``rows x choices`` matrices of scratch memory, which is why such models want small chunks.
"""

from __future__ import annotations

import onnx_ir as ir

from dspark_export.passes import match

_BODY = {"Gather", "Equal", "NonZero", "GatherND", "ScatterND"}


class GatherExperts(ir.passes.InPlacePass):
    """Replaces every expert loop of ``dspark_export/tracing/experts.py``; other loops stay."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Return the same model and whether it had expert loops."""
        loops = [node for node in model.graph if node.op_type == "Loop"]
        replaced = sum(_replace(model.graph, loop) for loop in loops)
        if replaced:
            match.remove_unused(model)
        return ir.passes.PassResult(model, modified=replaced > 0)


def _replace(graph: ir.Graph, loop: ir.Node) -> bool:
    body = list(loop.attributes["body"].as_graph())
    by_type = {node.op_type: node for node in body}
    multiplied = by_type.get("Gemm") or by_type.get("MatMul")  # matrices [out, in], or [in, out]
    if not set(by_type) >= _BODY or multiplied is None:
        return False
    rows, expert = by_type["GatherND"].inputs[0], by_type["Equal"].inputs[0]
    weight = multiplied.inputs[1].producer().inputs[0]
    name, dtype = loop.name or loop.outputs[0].name, rows.dtype
    one = match.int64_constant(graph, [1])
    chosen = _node("Gather", [weight, expert], f"{name}/matrices", dtype, attributes={"axis": 0})
    turned = _node("Transpose", [chosen.outputs[0]], f"{name}/turned", dtype, attributes={"perm": [0, 2, 1]})
    single = _node("Unsqueeze", [rows, one], f"{name}/rows", dtype)
    as_is = multiplied.op_type == "MatMul"
    matrices = chosen if as_is else turned
    product = _node("MatMul", [single.outputs[0], matrices.outputs[0]], f"{name}/product", dtype)
    out = _node("Squeeze", [product.outputs[0], one], f"{name}/out", dtype)
    match.insert_before(loop, [chosen, *([] if as_is else [turned]), single, product, out])
    match.replace_value(loop.outputs[0], out.outputs[0])
    for node in body:  # else what the loop's body read would count as used for as long as the loop exists
        for index in range(len(node.inputs)):
            node.replace_input_with(index, None)
    return True


def _node(
    op_type: str,
    inputs: list[ir.Value | None],
    name: str,
    dtype: ir.DataType | None,
    attributes: dict[str, int | list[int]] | None = None,
) -> ir.Node:
    node = ir.node(op_type, inputs, attributes=attributes, num_outputs=1, name=name)
    node.outputs[0].name = name
    node.outputs[0].type = ir.TensorType(dtype)
    return node
