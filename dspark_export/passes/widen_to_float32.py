"""ONNX Runtime CPU: half-precision weights, float32 arithmetic.

The CPU provider has few float16 and no bfloat16 kernels. This pass keeps the weights as they are stored and casts each
to float32 where it is read (ONNX Runtime does that once, when it loads the graph); activations, caches and logits
become float32. Casts inside the graph then do nothing.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

_HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_INLINE_ELEMENTS = 64


class WidenToFloat32(ir.passes.InPlacePass):
    """Retypes every float16 or bfloat16 tensor but the weights."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Return the same model and whether it held half-precision tensors."""
        modified = False
        for graph in model.graphs():  # bodies of loops too
            for node in list(graph):
                modified |= _retype_node(node)
            for value in [*graph.inputs, *(v for n in graph for v in n.outputs)]:
                if value.dtype in _HALF:
                    value.type = ir.TensorType(ir.DataType.FLOAT)
                    modified = True
            for value in list(graph.initializers.values()):
                if value.dtype in _HALF:
                    _widen_weight(graph, value)
                    modified = True
        return ir.passes.PassResult(model, modified=modified)


def _retype_node(node: ir.Node) -> bool:
    changed = False
    if node.op_type == "Cast" and ir.DataType(node.attributes["to"].as_int()) in _HALF:
        node.attributes["to"] = ir.AttrInt64("to", ir.DataType.FLOAT)
        changed = True
    attribute = node.attributes.get("value")
    if attribute is not None and attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype in _HALF:
        array = attribute.as_tensor().numpy().astype(np.float32)
        node.attributes["value"] = ir.AttrTensor("value", ir.tensor(array))
        changed = True
    return changed


def _widen_weight(graph: ir.Graph, value: ir.Value) -> None:
    tensor = value.const_value
    assert tensor is not None
    # Scalar operands are not weights; ONNX Runtime fuses a quantized product only if its scales are constants.
    scales = all(use.node.op_type == "DequantizeLinear" for use in value.uses())
    if tensor.size <= _INLINE_ELEMENTS or scales:
        array = tensor.numpy().astype(np.float32)
        value.const_value = ir.tensor(array, name=value.name)
        value.type = ir.TensorType(ir.DataType.FLOAT)
        return
    readers = list(value.uses())
    cast = ir.node("Cast", [value], attributes={"to": ir.DataType.FLOAT}, num_outputs=1, name=f"{value.name}/float32")
    cast.outputs[0].shape, cast.outputs[0].type = value.shape, ir.TensorType(ir.DataType.FLOAT)
    graph.insert_before(graph[0], [cast])
    for use in readers:
        use.node.replace_input_with(use.idx, cast.outputs[0])


def is_half(model: ir.Model) -> bool:
    """Whether the graph computes in float16 or bfloat16."""
    return any(value.dtype in _HALF for value in model.graph.inputs)
