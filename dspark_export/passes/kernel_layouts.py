"""Layouts of weights for the sequence kernels: packing in numpy, unpacking as ONNX nodes.

``docs/sequence-kernels.md`` describes them. A matrix [depth, width] is padded, cut into ``dims`` and transposed by
``order``, so that 16 columns lie together. Every packed tensor can be turned back by standard operators, which is how
graphs without kernels read the same bytes: ONNX Runtime folds those operators when it loads a graph.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx_ir as ir

from dspark_export.passes import match

TILE = 16
_NIBBLE_AXIS = 3
_LOW = np.uint8(15)
_HALF_BYTE = np.uint8(4)


@dataclass(frozen=True)
class Layout:
    """How a tensor [..., depth, width] of ``dtype`` is packed.

    ``dims`` is the shape after padding and cutting, ``order`` its permutation, ``offset`` what is added to signed
    integers to store them as bytes, ``nibbles`` whether two of them share a byte (along axis 3 of the permuted tensor).
    ``transposed``: the original is [..., width, depth]. ``wide``: it is float32; ``dtype`` holds its numbers exactly.
    """

    dtype: ir.DataType
    depth: int
    width: int
    dims: tuple[int, ...]
    order: tuple[int, ...]
    offset: int = 0
    nibbles: bool = False
    transposed: bool = False
    wide: bool = False

    @property
    def plain_dtype(self) -> ir.DataType:
        """Element type of the original."""
        return ir.DataType.FLOAT if self.wide else self.dtype

    @property
    def padded_width(self) -> int:
        """Columns of all tiles."""
        return -(-self.width // TILE) * TILE

    @property
    def padded_depth(self) -> int:
        """Rows of ``dims``."""
        return math.prod(self.dims) // self.padded_width

    @property
    def packed_shape(self) -> tuple[int, ...]:
        """Shape of the packed tensor without leading dimensions."""
        shape = tuple(self.dims[i] for i in self.order)
        return shape[:_NIBBLE_AXIS] + shape[_NIBBLE_AXIS + 1 :] if self.nibbles else shape

    @property
    def packed_dtype(self) -> ir.DataType:
        """Element type of the packed tensor."""
        return ir.DataType.UINT8 if self.is_integer else self.dtype

    @property
    def is_integer(self) -> bool:
        """Whether bytes are stored."""
        return not self.dtype.is_floating_point()

    def pack(self, array: np.ndarray) -> np.ndarray:
        """The packed tensor of ``array``; leading dimensions stay."""
        if self.transposed:
            array = array.swapaxes(-1, -2)
        if self.wide:
            array = array.astype(self.dtype.numpy())
        lead = array.shape[:-2]
        if self.is_integer:
            array = (array.astype(np.int16) + self.offset).astype(np.uint8)
        padding = [(0, 0)] * len(lead)
        padding += [(0, self.padded_depth - self.depth), (0, self.padded_width - self.width)]
        if any(after for _, after in padding):
            array = np.pad(array, padding, constant_values=self.offset)
        k = len(lead)
        array = array.reshape(*lead, *self.dims).transpose(*range(k), *(k + i for i in self.order))
        if self.nibbles:
            low, high = np.moveaxis(array, k + _NIBBLE_AXIS, 0)
            array = low | high << 4
        return np.ascontiguousarray(array)

    def unpack(self, packed: np.ndarray) -> np.ndarray:
        """The inverse of :meth:`pack`."""
        lead = packed.shape[: packed.ndim - len(self.packed_shape)]
        k = len(lead)
        if self.nibbles:
            packed = np.stack((packed & _LOW, packed >> _HALF_BYTE), axis=k + _NIBBLE_AXIS)
        back = np.argsort(self.order)
        array = packed.transpose(*range(k), *(k + int(i) for i in back))
        array = array.reshape(*lead, self.padded_depth, self.padded_width)[..., : self.depth, : self.width]
        if self.is_integer:
            array = (array.astype(np.int16) - self.offset).astype(self.dtype.numpy())
        if self.wide:
            array = array.astype(np.float32)
        return np.ascontiguousarray(array.swapaxes(-1, -2) if self.transposed else array)

    def unpack_nodes(self, graph: ir.Graph, packed: ir.Value, name: str, lead: tuple[int, ...]) -> list[ir.Node]:
        """Nodes that turn ``packed`` back, in order; the last one's output is the original tensor."""
        return _Unpacking(self, graph, packed, name, lead).nodes


class _Unpacking:
    def __init__(self, layout: Layout, graph: ir.Graph, packed: ir.Value, name: str, lead: tuple[int, ...]) -> None:
        self.nodes: list[ir.Node] = []
        self._graph, self._name, self._value = graph, name, packed
        k = len(lead)
        if layout.nibbles:
            self._split_bytes(k + _NIBBLE_AXIS)
        back = [int(i) for i in np.argsort(layout.order)]
        self._add("Transpose", perm=[*range(k), *(k + i for i in back)])
        self._add("Reshape", [*lead, layout.padded_depth, layout.padded_width])
        cuts = [(k, layout.depth, layout.padded_depth), (k + 1, layout.width, layout.padded_width)]
        for axis, wanted, have in cuts:
            if wanted != have:
                self._add("Slice", [0], [wanted], [axis])
        if layout.is_integer and layout.offset:
            self._add("Cast", to=int(ir.DataType.INT32))
            offset = match.add_initializer(graph, f"int32_{layout.offset}", ir.tensor(np.int32(layout.offset)))
            self._add("Sub", offset)
        if layout.is_integer:
            self._add("Cast", to=int(layout.dtype))
        if layout.wide:
            self._add("Cast", to=int(ir.DataType.FLOAT))
        if layout.transposed:
            self._add("Transpose", perm=[*range(k), k + 1, k])

    def _add(self, op_type: str, *inputs: list[int] | ir.Value, **attributes: int | str | list[int]) -> None:
        values = [match.int64_constant(self._graph, i) if isinstance(i, list) else i for i in inputs]
        name = f"{self._name}/unpacked.{len(self.nodes)}"
        node = ir.node(op_type, [self._value, *values], attributes=attributes, num_outputs=1, name=name)
        node.outputs[0].name = name
        self.nodes.append(node)
        self._value = node.outputs[0]

    def _split_bytes(self, axis: int) -> None:
        whole = self._value
        mask, shift = (
            match.add_initializer(self._graph, f"uint8_{int(v)}", ir.tensor(np.asarray(v))) for v in (_LOW, _HALF_BYTE)
        )
        halves = []
        for op_type, operand, attributes in (
            ("BitwiseAnd", mask, {}),
            ("BitShift", shift, {"direction": "RIGHT"}),
        ):
            self._value = whole
            self._add(op_type, operand, **attributes)
            self._add("Unsqueeze", [axis])
            halves.append(self._value)
        name = f"{self._name}/unpacked.{len(self.nodes)}"
        joined = ir.node("Concat", halves, attributes={"axis": axis}, num_outputs=1, name=name)
        joined.outputs[0].name = name
        self.nodes.append(joined)
        self._value = joined.outputs[0]


def tiles_of_floats(
    depth: int, width: int, dtype: ir.DataType, transposed: bool = False, *, wide: bool = False
) -> Layout:
    """Layout of ``ProductFloat32``, ``ProductFloat16`` and ``ProductBFloat16``; ``wide``: of float32 numbers."""
    tiles = -(-width // TILE)
    if dtype == ir.DataType.BFLOAT16:
        dims, order = (-(-depth // 2), 2, tiles, TILE), (2, 0, 3, 1)
    else:
        dims, order = (depth, tiles, TILE), (1, 0, 2)
    return Layout(dtype, depth, width, dims, order, transposed=transposed, wide=wide)


def tiles_of_blocks(depth: int, width: int, dtype: ir.DataType, block: int) -> Layout:
    """Layout of the integers of ``ProductInt8`` and ``ProductInt4``, or, unsigned, of the forms with a minimum."""
    tiles, blocks = -(-width // TILE), depth // block
    if dtype in (ir.DataType.INT4, ir.DataType.UINT4):
        dims, order = (blocks, block // 8, 2, 4, tiles, TILE), (4, 0, 1, 2, 5, 3)
        return Layout(dtype, depth, width, dims, order, 8 if dtype == ir.DataType.INT4 else 0, nibbles=True)
    dims, order = (blocks, block // 4, 4, tiles, TILE), (3, 0, 1, 4, 2)
    return Layout(dtype, depth, width, dims, order, 128 if dtype == ir.DataType.INT8 else 0)


def tiles_of_columns(depth: int, width: int) -> Layout:
    """Layout of the integers of ``ProductW8A8``."""
    dims, order = (-(-depth // 4), 4, -(-width // TILE), TILE), (2, 0, 3, 1)
    return Layout(ir.DataType.INT8, depth, width, dims, order, 128)


def tiles_of_scales(blocks: int, width: int, dtype: ir.DataType) -> Layout:
    """Layout of scales and minima of weights in blocks."""
    return Layout(dtype, blocks, width, (blocks, -(-width // TILE), TILE), (1, 0, 2))


NUMPY = {ir.DataType.INT4: ml_dtypes.int4, ir.DataType.UINT4: ml_dtypes.uint4}
