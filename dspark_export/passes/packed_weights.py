"""One copy of every weight, in the layout of the sequence kernels, for graphs with kernels and without.

The passes that write kernels pack weights into a :class:`PackedWeights`. :class:`ReadPackedWeights` then makes any
other form of the model read those: where an initializer was packed, standard operators turn the packed bytes back, and
ONNX Runtime folds them when it loads the graph. :class:`UnpackWeights` undoes that for tools that want plain weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from dspark_export.passes import match
from dspark_export.passes.kernel_layouts import Layout
from dspark_runtime.backends.ort_kernels import DOMAIN

LAYOUT = "dspark.layout"
"""Metadata of the node that gives an unpacked weight: JSON of its :class:`Layout`."""
_PIECE = 1 << 20


@dataclass(frozen=True)
class Packed:
    """A packed tensor. ``lead``: dimensions before the matrix, of experts."""

    layout: Layout
    tensor: ir.LazyTensor
    lead: tuple[int, ...] = ()


class PackedWeights:
    """What has been packed so far, by the tensor it was made from."""

    def __init__(self) -> None:
        self._made: dict[object, tuple[Packed, ir.TensorProtocol]] = {}
        self._names: set[str] = set()
        self._narrowest: dict[object, tuple[ir.DataType, ir.TensorProtocol]] = {}

    def pack(self, weight: ir.Value, layout: Layout) -> Packed | None:
        """The constant ``weight`` in ``layout``; None if it is packed in another one already."""
        source = weight.const_value
        found = self.find(source)
        if found is None:
            lead = tuple(int(d) for d in source.shape)[:-2]
            found = Packed(layout, _lazily(source, self._new_name(str(weight.name)), layout, lead), lead)
            self._made[match.tensor_identity(source)] = (found, source)
        return found if found.layout == layout else None

    def narrowest(self, source: ir.TensorProtocol) -> ir.DataType:
        """The smallest float type that holds every number of ``source``: a kernel widens it to the same bits."""
        if source.dtype != ir.DataType.FLOAT:
            return source.dtype
        key = match.tensor_identity(source)
        if key not in self._narrowest:
            self._narrowest[key] = (exact_type(source.numpy()), source)
        return self._narrowest[key][0]

    def _new_name(self, weight: str) -> str:
        """A name of its own: a draft's graph may read its own head, and the target's of the same name as a table."""
        name, count = f"{weight}.tiles", 1
        while name in self._names:
            count += 1
            name = f"{weight}.tiles.{count}"
        self._names.add(name)
        return name

    def share(self, source: ir.TensorProtocol, packed: Packed, layout: Layout) -> None:
        """Let ``source``, the same numbers in another shape, be read from ``packed`` through ``layout``."""
        self._made.setdefault(match.tensor_identity(source), (Packed(layout, packed.tensor, packed.lead), source))

    def find(self, source: ir.TensorProtocol | None) -> Packed | None:
        """What was made of ``source``, if anything."""
        made = None if source is None else self._made.get(match.tensor_identity(source))
        return None if made is None else made[0]


def exact_type(array: np.ndarray) -> ir.DataType:
    """bfloat16, float16 or float32: the first that holds every number of the float32 ``array`` exactly."""
    flat = array.reshape(-1)
    pieces = [flat[start : start + _PIECE] for start in range(0, flat.size, _PIECE)]
    for dtype in (ir.DataType.BFLOAT16, ir.DataType.FLOAT16):
        with np.errstate(over="ignore"):
            if all(np.array_equal(piece.astype(dtype.numpy()).astype(np.float32), piece) for piece in pieces):
                return dtype
    return ir.DataType.FLOAT


def _lazily(source: ir.TensorProtocol, name: str, layout: Layout, lead: tuple[int, ...]) -> ir.LazyTensor:
    def packed() -> ir.Tensor[np.ndarray]:
        return ir.Tensor(layout.pack(source.numpy()), dtype=layout.packed_dtype, name=name)

    shape = ir.Shape((*lead, *layout.packed_shape))
    return ir.LazyTensor(packed, dtype=layout.packed_dtype, shape=shape, name=name)


def packed_value(graph: ir.Graph, packed: Packed) -> ir.Value:
    """The initializer of ``packed`` in ``graph``."""
    return match.add_initializer(graph, str(packed.tensor.name), packed.tensor)


class ReadPackedWeights(ir.passes.InPlacePass):
    """Makes a graph read packed weights instead of plain ones, through operators that turn them back."""

    def __init__(self, weights: PackedWeights) -> None:
        super().__init__()
        self._weights = weights

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Return the same model and whether a weight is read from its packed form now."""
        found = [(v, self._weights.find(v.const_value)) for v in model.graph.initializers.values()]
        replaced = sum(_turn_back(model.graph, value, packed) for value, packed in found if packed is not None)
        if replaced:
            match.remove_unused(model)
        return ir.passes.PassResult(model, modified=replaced > 0)


def _turn_back(graph: ir.Graph, value: ir.Value, packed: Packed) -> bool:
    readers = [use for use in value.uses() if use.node.domain != DOMAIN]
    if not readers:
        return False
    source = packed_value(graph, packed)
    nodes = packed.layout.unpack_nodes(graph, source, str(value.name), packed.lead)
    plain = nodes[-1].outputs[0]
    plain.shape, plain.type = value.shape, value.type
    nodes[-1].metadata_props[LAYOUT] = json.dumps(
        {**asdict(packed.layout), "dtype": packed.layout.dtype.name, "weight": value.name, "source": source.name}
    )
    graph.insert_before(graph[0], nodes)
    for use in readers:
        use.node.replace_input_with(use.idx, plain)
    return True


def load_plain(path: Path) -> ir.Model:
    """The graph at ``path`` with plain weights under their own names."""
    model = ir.load(path)
    UnpackWeights()(model)
    return model


class UnpackWeights(ir.passes.InPlacePass):
    """Undoes :class:`ReadPackedWeights`: plain initializers under their own names, turned back when they are read."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Return the same model and whether it had packed weights."""
        graph, count = model.graph, 0
        for node in list(graph):
            if LAYOUT in node.metadata_props:
                facts = json.loads(node.metadata_props[LAYOUT])
                name, source = facts["weight"], graph.initializers[facts["source"]].const_value
                plain = _plain(name, source, layout_of(facts))
                value = match.add_initializer(graph, name, plain)
                match.replace_value(node.outputs[0], value)
                count += 1
        if count:
            match.remove_unused(model)
        return ir.passes.PassResult(model, modified=count > 0)


def layout_of(facts: Mapping[str, Any]) -> Layout:
    """The layout that metadata under :data:`LAYOUT` describes."""
    given = {field.name: facts[field.name] for field in fields(Layout) if field.name in facts}
    tuples = {key: tuple(value) for key, value in given.items() if isinstance(value, list)}
    return Layout(**{**given, **tuples, "dtype": ir.DataType[facts["dtype"]]})


def _plain(name: str, packed: ir.TensorProtocol, layout: Layout) -> ir.LazyTensor:
    lead = tuple(int(d) for d in packed.shape)[: len(packed.shape) - len(layout.packed_shape)]
    matrix = (layout.width, layout.depth) if layout.transposed else (layout.depth, layout.width)

    def unpacked() -> ir.Tensor[np.ndarray]:
        return ir.Tensor(layout.unpack(packed.numpy()), dtype=layout.plain_dtype, name=name)

    return ir.LazyTensor(unpacked, dtype=layout.plain_dtype, shape=ir.Shape((*lead, *matrix)), name=name)
