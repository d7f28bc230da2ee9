"""Engines only: queries, keys and values of one width, and of one that fused kernels exist for.

TensorRT's attention takes keys and values of one width (multi-head latent attention has narrower values), and its fused
kernels multiples of 8 from 16 to 256. Anything narrower is padded with zeros as it is read from the cache, which keeps
its own width: zeros after a key (and its query) leave every score unchanged, and what zeros after a value add to the
output is cut off again. The scale must be explicit, since its default depends on the width.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from dspark_export.passes import match

_LEAST, _STEP = 16, 8


class EqualAttentionWidths(ir.passes.InPlacePass):
    """Pads keys and queries, and values, of every ``Attention`` that TensorRT would not accept unchanged."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Return the same model and whether an attention was padded."""
        changed = 0
        for node in list(model.graph):
            if node.op_type != "Attention" or node.domain not in ("", "ai.onnx"):
                continue
            keys, values = match.last_dim(node.inputs[1]), match.last_dim(node.inputs[2])
            if keys is None or values is None:
                continue
            wanted = -(-max(keys, values, _LEAST) // _STEP) * _STEP
            if keys == values == wanted:
                continue
            if "scale" not in node.attributes:
                node.attributes["scale"] = ir.AttrFloat32("scale", 1.0 / math.sqrt(keys))
            if keys < wanted:
                _pad(model.graph, node, 0, wanted)
                _pad(model.graph, node, 1, wanted)
            if values < wanted:
                _pad(model.graph, node, 2, wanted)
                _cut(model.graph, node, values)
            changed += 1
        return ir.passes.PassResult(model, modified=changed > 0)


def _pad(graph: ir.Graph, node: ir.Node, index: int, wide: int) -> None:
    source = node.inputs[index]
    missing = wide - match.last_dim(source)
    zero = match.add_initializer(
        graph, f"zero_{source.dtype.name.lower()}", ir.tensor(np.zeros((), source.dtype.numpy()), dtype=source.dtype)
    )
    pads = match.int64_constant(graph, [0, 0, 0, 0, 0, 0, 0, missing])
    padded = ir.node("Pad", [source, pads, zero], num_outputs=1, name=f"{source.name}/padded")
    # TensorRT loses the number of heads on the way and wants to see that keys and values have the same.
    shape = match.int64_constant(graph, [0, source.shape[1], -1, wide])
    known = ir.node("Reshape", [padded.outputs[0], shape], num_outputs=1, name=f"{source.name}/known")
    for made in (padded, known):
        made.outputs[0].name, made.outputs[0].type = made.name, source.type
        made.outputs[0].shape = ir.Shape([*list(source.shape)[:-1], wide])
    match.insert_before(node, [padded, known])
    node.replace_input_with(index, known.outputs[0])


def _cut(graph: ir.Graph, node: ir.Node, width: int) -> None:
    """Keep the first ``width`` numbers of every row of the attention's output."""
    wide = node.outputs[0]
    bounds = [match.int64_constant(graph, [number]) for number in (0, width, -1)]
    cut = ir.node("Slice", [wide, *bounds], num_outputs=1, name=f"{node.name}/cut")
    cut.outputs[0].name, cut.outputs[0].type, cut.outputs[0].shape = cut.name, wide.type, wide.shape
    readers = [use for use in wide.uses() if use.node is not cut]
    node.graph.insert_after(node, [cut])
    for use in readers:
        use.node.replace_input_with(use.idx, cut.outputs[0])
    if wide.shape is not None:
        wide.shape = ir.Shape([*list(wide.shape)[:-1], match.last_dim(node.inputs[2])])
