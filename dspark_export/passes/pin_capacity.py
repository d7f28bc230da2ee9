"""Engines only: the number of cache slots becomes a constant of the graph.

TensorRT updates a cache in place only if its length is known while it compiles. ONNX Runtime keeps it symbolic.
"""

from __future__ import annotations

import onnx_ir as ir

CAPACITY = "capacity"


class PinCapacity(ir.passes.InPlacePass):
    """Replaces the symbolic dimension ``capacity`` by ``slots`` wherever it occurs."""

    def __init__(self, slots: int) -> None:
        if slots < 1:
            raise ValueError(f"a cache of {slots} slots holds nothing")
        self.slots = slots

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Return the same model and whether it had a cache of symbolic length."""
        modified = False
        for graph in model.graphs():
            values = [*graph.inputs, *(value for node in graph for value in node.outputs)]
            for value in values:
                if value.shape is None or CAPACITY not in [_name(dim) for dim in value.shape]:
                    continue
                dims = [self.slots if _name(dim) == CAPACITY else dim for dim in value.shape]
                value.shape = ir.Shape(dims)
                modified = True
        return ir.passes.PassResult(model, modified=modified)


def _name(dim: int | ir.SymbolicDim) -> str | None:
    return dim.value if isinstance(dim, ir.SymbolicDim) else None
