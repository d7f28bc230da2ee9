"""The weights that a graph stores, as matrices and vectors of the floats they stand for."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from dspark_export.passes import match
from dspark_export.passes.smooth_norms import gain_of
from dspark_export.validate.quantized import SUFFIX, QuantizedWeight, find_quantized

Tensor = npt.NDArray[Any]
_HELD = 6


@dataclass(frozen=True)
class Matrix:
    """Two dimensions of a weight. ``read`` gives it in float32, ``steps`` how far apart the numbers are that each
    element can be; None: they are the floats ``dtype``."""

    name: str
    shape: tuple[int, int]
    dtype: ir.DataType
    read: Callable[[], Tensor]
    steps: Callable[[], Tensor] | None = None


@dataclass(frozen=True)
class Vector:
    """A weight of one dimension, dimensions of 1 left out, in float32; its numbers are the floats ``dtype``.

    ``plus_one``: the graph adds 1 to it.
    """

    name: str
    values: Tensor
    dtype: ir.DataType
    plus_one: bool


@dataclass(frozen=True)
class GraphWeights:
    """All weights of a graph. ``gains``: by the name of a norm's gain the products that read the norm, where channels
    may have been scaled by powers of two between them."""

    matrices: tuple[Matrix, ...]
    vectors: tuple[Vector, ...]
    gains: dict[str, tuple[str, ...]]


class _Recent:
    """Keeps the last arrays that were read: parts of one are often asked for one after the other."""

    def __init__(self) -> None:
        self._held: OrderedDict[object, Tensor] = OrderedDict()

    def get(self, key: object, read: Callable[[], Tensor]) -> Tensor:
        """What ``read`` gives, or gave lately."""
        if key not in self._held:
            self._held[key] = read()
            if len(self._held) > _HELD:
                self._held.popitem(last=False)
        self._held.move_to_end(key)
        return self._held[key]


def graph_weights(model: ir.Model, *, exact: bool) -> GraphWeights:
    """The weights of ``model``, whose initializers are plain (see :func:`~.passes.packed_weights.load_plain`).

    ``exact``: its integers are the checkpoint's own, and stand for the very numbers.
    """
    recent, matrices, vectors, parts = _Recent(), list[Matrix](), list[Vector](), set[str]()
    raised = _plus_one(model)
    for found in find_quantized(model):
        parts |= set(found.parts)
        if not any(known.name == found.name for known in matrices):
            matrices.append(_quantized(found, recent, exact))
    for name, tensor in _floats(model):
        shape = tuple(size for size in tensor.shape.numpy() if size != 1)
        if name in parts:
            continue
        if len(shape) < 2:
            values = tensor.numpy().astype(np.float32).reshape(-1)
            vectors.append(Vector(name, values, tensor.dtype, name in raised))
        else:
            matrices += _matrices(name, tensor, shape, recent)
    return GraphWeights(tuple(matrices), tuple(vectors), _gains(model))


def _floats(model: ir.Model) -> Iterator[tuple[str, ir.TensorProtocol]]:
    for name, value in model.graph.initializers.items():
        if value.const_value is not None and value.const_value.dtype.is_floating_point():
            yield str(name), value.const_value
    for node in model.graph:
        if node.op_type == "Constant" and "value" in node.attributes:
            tensor = node.attributes["value"].as_tensor()
            if tensor.dtype.is_floating_point():
                yield str(node.outputs[0].name), tensor


def _quantized(found: QuantizedWeight, recent: _Recent, exact: bool) -> Matrix:
    rows, columns = found.shape
    steps = None if exact else partial(recent.get, f"{found.name} steps", found.steps)
    return Matrix(found.name, (rows, columns), ir.DataType.FLOAT, partial(recent.get, found.name, found.wide), steps)


def _matrices(name: str, tensor: ir.TensorProtocol, shape: tuple[int, ...], recent: _Recent) -> Iterator[Matrix]:
    """All matrices of a tensor: experts are one behind the other."""

    def read(index: tuple[int, ...]) -> Tensor:
        whole = recent.get(name, lambda: tensor.numpy().astype(np.float32).reshape(shape))
        part: Tensor = whole[index]
        return part

    for index in np.ndindex(*shape[:-2]):
        yield Matrix(f"{name}{list(index) or ''}", (shape[-2], shape[-1]), tensor.dtype, partial(read, index))


def _plus_one(model: ir.Model) -> set[str]:
    """Names of what 1 is added to: gains, in Gemma."""
    adds = [node for node in model.graph if node.op_type == "Add" and len(node.inputs) == 2]
    return {str(value.name) for node in adds for value, one in match.operands(node) if match.scalar(one) == 1.0}


def _gains(model: ir.Model) -> dict[str, tuple[str, ...]]:
    found = {}
    for node in model.graph:
        gain = gain_of(node)
        if gain is None:
            continue
        products = [use.node for use in node.outputs[0].uses() if use.node.op_type == "MatMul"]
        makers = [match.producer(product.inputs[1], "DequantizeLinear") for product in products]
        found[str(gain.name)] = tuple(str(maker.name).removesuffix(SUFFIX) for maker in makers if maker is not None)
    return found
