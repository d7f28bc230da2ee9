"""Small questions a pass asks about a graph: who made this value, is it a constant, who else reads it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import onnx_ir as ir

STANDARD_DOMAIN = ""
RANGES = "dspark.activation_ranges"
"""Metadata of a graph: JSON of the magnitudes that products' activations are rounded with, by the product's weight."""
DRAFTS = "dspark.block_drafts"
"""Metadata of a block drafter's graph: kind of its Markov head; absent where that corrects chosen tokens only."""
SMOOTHED = "dspark.smoothed_norms"
"""Metadata of a graph: JSON list of the gains whose channels were smoothed."""


def producer(value: ir.Value | None, *op_types: str, domain: str = STANDARD_DOMAIN) -> ir.Node | None:
    """The node that makes ``value`` if it is one of ``op_types``, else None."""
    if value is None:
        return None
    node = value.producer()
    if node is None or node.domain not in (domain, "ai.onnx") or (op_types and node.op_type not in op_types):
        return None
    return node


def constant(value: ir.Value | None, *, max_elements: int = 1 << 16) -> np.ndarray | None:
    """The array of a small initializer or ``Constant`` node, else None. Weights are never read by accident."""
    if value is None:
        return None
    tensor = value.const_value
    if tensor is None:
        node = producer(value, "Constant")
        if node is None or "value" not in node.attributes:
            return None
        tensor = node.attributes["value"].as_tensor()
    elif not (value.is_initializer() or producer(value, "Constant")):
        return None
    if tensor.size > max_elements:
        return None
    return tensor.numpy()


def scalar(value: ir.Value | None) -> float | None:
    """A one-element constant as a float, else None."""
    array = constant(value)
    return None if array is None or array.size != 1 else float(array.reshape(-1)[0])


def integers(value: ir.Value | None) -> list[int] | None:
    """A small integer constant as a list, else None."""
    array = constant(value)
    return None if array is None or not np.issubdtype(array.dtype, np.integer) else [int(i) for i in array.reshape(-1)]


def other_operand(node: ir.Node, value: ir.Value) -> ir.Value | None:
    """The other input of a two-input node that reads ``value``."""
    left, right = node.inputs
    if left is value:
        return right
    return left if right is value else None


def operands(node: ir.Node) -> Iterable[tuple[ir.Value, ir.Value]]:
    """Both orders of a commutative node's two inputs."""
    left, right = node.inputs
    if left is not None and right is not None:
        yield left, right
        yield right, left


def only_consumer(value: ir.Value, *op_types: str) -> ir.Node | None:
    """The single node that reads ``value`` (which is not a graph output), if it is one of ``op_types``."""
    uses = list(value.uses())
    if len(uses) != 1 or value.is_graph_output():
        return None
    node = uses[0].node
    return node if not op_types or node.op_type in op_types else None


def rank(value: ir.Value) -> int | None:
    """Number of dimensions, where known."""
    return None if value.shape is None else len(value.shape)


def last_dim(value: ir.Value) -> int | None:
    """Size of the last dimension, where known and fixed."""
    if value.shape is None or len(value.shape) == 0:
        return None
    dim = value.shape[-1]
    return dim if isinstance(dim, int) else None


def is_last_axis(axes: Sequence[int] | None, value: ir.Value) -> bool:
    """Whether a reduction over ``axes`` is one over the last axis of ``value``."""
    if axes is None or len(axes) != 1:
        return False
    return axes[0] == -1 or (value.shape is not None and axes[0] == len(value.shape) - 1)


def add_initializer(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    """Add a constant to ``graph``, or return the one of that name that is there already."""
    found = graph.initializers.get(name)
    if found is not None:
        return found
    value = ir.Value(name=name, shape=ir.Shape(tensor.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def int64_constant(graph: ir.Graph, values: Sequence[int]) -> ir.Value:
    """A shared 1-D int64 initializer with a name that says its content."""
    array = np.asarray(values, dtype=np.int64)
    name = "int64_" + "_".join(str(v).replace("-", "m") for v in values)
    return add_initializer(graph, name, ir.tensor(array, name=name))


def insert_before(anchor: ir.Node, nodes: Sequence[ir.Node]) -> None:
    """Insert ``nodes`` just before ``anchor`` and give them its metadata (the module scope they came from)."""
    graph = anchor.graph
    assert graph is not None
    for node in nodes:
        node.metadata_props.update(anchor.metadata_props)
    graph.insert_before(anchor, nodes)


def replace_value(old: ir.Value, new: ir.Value) -> None:
    """Make every reader of ``old`` read ``new``; a graph output keeps its name."""
    if new.shape is None:
        new.shape = old.shape
    if new.type is None:
        new.type = old.type
    output_name = old.name if old.is_graph_output() else None
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    if output_name is not None:
        old.name, new.name = f"{output_name}.replaced", output_name


def tensor_identity(tensor: ir.TensorProtocol) -> object:
    """Equal for tensors over the same memory; valid for as long as ``tensor`` lives."""
    import torch

    raw = getattr(tensor, "raw", None)
    if isinstance(raw, torch.Tensor):
        return (raw.data_ptr(), tuple(raw.shape), raw.stride(), raw.dtype)
    return id(tensor)


def remove_unused(model: ir.Model) -> None:
    """Drop nodes and initializers that nothing reads."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    RemoveUnusedNodesPass()(model)
