"""ONNX Runtime CPU: residual add and RMS norm in one kernel (``SkipSimplifiedLayerNormalization``)."""

from __future__ import annotations

import onnx_ir as ir

from dspark_export.passes import match

DOMAIN = "com.microsoft"


class OrtCpuSkipNorm(ir.passes.InPlacePass):
    """Rewrites ``RMSNormalization(a + b)``; the sum stays available to its other readers."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Return the same model and whether a pair was rewritten."""
        fused = 0
        for norm in list(model.graph):
            if norm.op_type != "RMSNormalization":
                continue
            add = match.producer(norm.inputs[0], "Add")
            if add is None or not _same_shape(add.inputs) or match.rank(add.outputs[0]) != 3:
                continue
            _fuse(norm, add)
            fused += 1
        if fused:
            model.opset_imports[DOMAIN] = 1
            match.remove_unused(model)
        return ir.passes.PassResult(model, modified=fused > 0)


def _same_shape(values: tuple[ir.Value | None, ...]) -> bool:
    shapes = [None if v is None or v.shape is None else [str(d) for d in v.shape] for v in values]
    return None not in shapes and shapes[0] == shapes[1] and not any(v.is_initializer() for v in values if v)


def _fuse(norm: ir.Node, add: ir.Node) -> None:
    epsilon = norm.attributes["epsilon"].as_float() if "epsilon" in norm.attributes else 1e-5
    node = ir.node(
        "SkipSimplifiedLayerNormalization",
        [add.inputs[0], add.inputs[1], norm.inputs[1]],
        attributes={"epsilon": epsilon},
        domain=DOMAIN,
        num_outputs=4,
        name=norm.name,
    )
    normed, _, _, total = node.outputs
    # The two middle outputs (mean, inverse deviation) are not wanted: an empty name leaves them out.
    node.outputs[1].name = node.outputs[2].name = ""
    for old, new in ((norm.outputs[0], normed), (add.outputs[0], total)):
        new.shape, new.type = old.shape, old.type
    match.insert_before(add, [node])
    match.replace_value(add.outputs[0], total)
    match.replace_value(norm.outputs[0], normed)
