"""Clean-up of a freshly traced graph that needs no knowledge of models: constants folded, common subexpressions
shared, linear layers' weights stored the way ``MatMul`` reads them. Weights keep their names and are never copied.
"""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir
import onnx_ir.passes.common as common
import torch
from onnx_ir.tensor_adapters import TorchTensor
from onnxscript import optimizer

SCOPES_KEY = "pkg.torch.onnx.name_scopes"
"""Node metadata: the list of module paths a node came from, outermost first (``... 'model.model.layers.3' ...``)."""


def tidy(model: ir.Model) -> None:
    """Optimize ``model`` in place; see the module's docstring."""
    weights = {value.name for value in model.graph.initializers.values()}

    def should_fold(node: ir.Node) -> bool | None:
        return False if any(value is not None and value.name in weights for value in node.inputs) else None

    common.InlinePass()(model)
    optimizer.fold_constants_ir(model, onnx_shape_inference=True, should_fold=should_fold)
    store_linear_weights_transposed(model)
    ir.passes.Sequential(
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),
        common.RemoveUnusedOpsetsPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
    )(model)
    share_equal_constants(model, weights)
    ir.passes.Sequential(
        common.IdentityEliminationPass(),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    )(model)
    keep_only_module_paths(model)


def keep_only_module_paths(model: ir.Model) -> None:
    """Drop torch's metadata but for the nodes' module paths: stack traces name files of the machine that traced."""
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        for key in [key for key in node.metadata_props if key != SCOPES_KEY]:
            del node.metadata_props[key]
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.metadata_props.clear()
    model.graph.metadata_props.clear()


def store_linear_weights_transposed(model: ir.Model) -> None:
    """A weight that is only ever read through ``Transpose`` is replaced by its transposed view, under its own name.

    A weight that is also read as it is (an embedding tied to the head) stays: one copy on disk serves both.
    """
    for value in list(model.graph.initializers.values()):
        readers = [user.node for user in value.uses()]
        tensor = value.const_value
        raw = tensor.raw if isinstance(tensor, ir.Tensor) else None
        if not readers or not isinstance(raw, torch.Tensor) or raw.dim() != 2:
            continue
        if any(r.op_type != "Transpose" or r.domain or r.attributes.get_ints("perm") != (1, 0) for r in readers):
            continue
        view = raw.t()
        value.const_value = TorchTensor(view, name=value.name)
        value.shape = ir.Shape(tuple(view.shape))
        for reader in readers:
            reader.outputs[0].replace_all_uses_with(value)
            model.graph.remove(reader, safe=True)


def share_equal_constants(model: ir.Model, weights: Collection[str | None]) -> None:
    """One initializer for all equal ones, except ``weights``: those stay apart, since their names mean something."""
    first: dict[tuple[ir.DataType, tuple[int, ...], bytes], ir.Value] = {}
    for name, value in list(model.graph.initializers.items()):
        tensor = value.const_value
        if name in weights or tensor is None:
            continue
        kept = first.setdefault((tensor.dtype, tuple(map(int, tensor.shape)), tensor.tobytes()), value)
        if kept is not value and not value.is_graph_output():
            value.replace_all_uses_with(kept)
            del model.graph.initializers[name]
