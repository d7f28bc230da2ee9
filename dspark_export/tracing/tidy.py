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

from dspark_runtime.bundle.contract import ATTENTION_MASK, INPUT_IDS, LOGIT_ROWS

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
        common.RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]
        common.RemoveUnusedOpsetsPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
    )(model)
    share_equal_constants(model, weights)
    read_sizes_from_fixed_inputs(model)
    ir.passes.Sequential(
        common.IdentityEliminationPass(),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    )(model)
    keep_only_module_paths(model)


_SIZE_SOURCES = {
    "batch": (INPUT_IDS, 0),
    "tokens": (INPUT_IDS, 1),
    "kv_len": (ATTENTION_MASK, 3),
    "rows": (LOGIT_ROWS, 1),
}


def read_sizes_from_fixed_inputs(model: ir.Model) -> None:
    """Sizes are read from the inputs every graph has. The tracer takes them from any input, a cache tensor as well,
    and that would keep a layer's cache alive in a graph that does not run the layer.
    """
    inputs = {value.name: value for value in model.graph.inputs}
    for node in model.graph:
        value = node.inputs[0] if node.op_type == "Shape" and not node.domain else None
        if value is None or value.shape is None or value is not inputs.get(value.name):
            continue
        start = node.attributes.get_int("start", 0)
        end = node.attributes.get_int("end", len(value.shape))
        dim = value.shape[start]
        source = _SIZE_SOURCES.get(str(dim.value)) if isinstance(dim, ir.SymbolicDim) else None
        if end != start + 1 or source is None:
            continue
        name, axis = source
        if name not in inputs:  # a drafter's graph, which is never cut down to fewer layers
            continue
        node.replace_input_with(0, inputs[name])
        node.attributes["start"], node.attributes["end"] = ir.AttrInt64("start", axis), ir.AttrInt64("end", axis + 1)


def remove_unreachable_nodes(graph: ir.Graph) -> None:
    """Remove every node no graph output depends on, those that hold subgraphs included."""
    live: set[ir.Node] = set()
    pending = [value.producer() for value in graph.outputs]
    while pending:
        node = pending.pop()
        if node is None or node in live:
            continue
        live.add(node)
        pending += [value.producer() for value in _read_by(node)]
    dead = [node for node in graph if node not in live]
    for node in dead:
        for inner in _with_inner_nodes(node):
            for index in range(len(inner.inputs)):
                inner.replace_input_with(index, None)
    graph.remove(dead, safe=True)
    used = {value for node in live for value in _read_by(node)} | set(graph.outputs)
    for name, value in list(graph.initializers.items()):
        if value not in used:
            del graph.initializers[name]


def _with_inner_nodes(node: ir.Node) -> list[ir.Node]:
    inner = [
        nested
        for attribute in node.attributes.values()
        if attribute.type == ir.AttributeType.GRAPH
        for nested in ir.traversal.RecursiveGraphIterator(attribute.as_graph())
    ]
    return [node, *inner]


def _read_by(node: ir.Node) -> list[ir.Value]:
    """Values ``node`` reads, its subgraphs' readings from outside included (and harmless inner ones)."""
    read = [value for reader in _with_inner_nodes(node) for value in reader.inputs if value is not None]
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            read += list(attribute.as_graph().outputs)
    return read


def keep_only_module_paths(model: ir.Model) -> None:
    """Drop torch's metadata except the nodes' module paths: stack traces name files of the machine that traced."""
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

    A weight that is also read untransposed (an embedding tied to the head) stays: one copy on disk serves both.
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
        kept = first.setdefault((tensor.dtype, tuple(tensor.shape.numpy()), tensor.tobytes()), value)
        if kept is not value and not value.is_graph_output():
            value.replace_all_uses_with(kept)
            del model.graph.initializers[name]
