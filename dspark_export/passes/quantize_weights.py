"""Weight-only block quantization in standard operators.

Every large matrix product reads its weight through a blocked ``DequantizeLinear``: integers [in, out], one scale (and,
asymmetric, one zero point) per ``block_size`` inputs of each output, or half as many, and so on down to 16, where that
is what divides the inputs. ONNX Runtime fuses the pair into its own kernel when it loads the graph; TensorRT reads it
unchanged. 4-bit blocks are made by ONNX Runtime's own quantizer, 8-bit blocks (which it does not write in this form)
by the same rule with 8 bits: symmetric, scale = max |w| / 127.

Without blocks, each output has one scale, max |w| / 63: what integer products need (see ort_cpu_integer_products).

The embedding table becomes 8-bit rows: gathered first and dequantized after, so that only the rows of a pass are read.
Tables whose rows are at most one block wide are not quantized: three nodes per lookup would take longer than one.
"""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np
import onnx_ir as ir

from dspark_export.grids import fitting_block
from dspark_export.passes import match

MIN_ELEMENTS = 1 << 12
TABLE_BLOCK = 32
COLUMN_STEPS = 63
"""Of weights with one scale an output: times 255 and added in pairs, as some processors do, they fit 16 bits."""


@dataclass(frozen=True)
class BlockQuantization:
    """How weights are quantized. ``block_size`` None: 8 bits with one scale an output, for integer products. ``head``
    and ``embedding`` say whether those two matrices are included."""

    bits: int
    block_size: int | None = 32
    symmetric: bool = True
    head: bool = True
    embedding: bool = True


class QuantizeWeights(ir.passes.InPlacePass):
    """Quantizes the weights of matrix products, and optionally the head and the embedding table."""

    def __init__(self, settings: BlockQuantization, head_output: str = "logits") -> None:
        super().__init__()
        self.settings = settings
        self._head_output = head_output
        self.quantized: list[str] = []
        self.skipped: list[str] = []
        self._named: Counter[str] = Counter()

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Return the same model; ``quantized`` and ``skipped`` then list the weights by name."""
        graph = model.graph
        head = self._head_product(graph)
        for node in list(graph):
            if node.op_type == "MatMul" and (node is not head or self.settings.head):
                self._quantize_product(graph, node)
        if self.settings.embedding:
            for node in [n for n in graph if n.op_type == "Gather"]:
                self._quantize_embedding(graph, node)
        if self.quantized:
            match.remove_unused(model)
        return ir.passes.PassResult(model, modified=bool(self.quantized))

    def _head_product(self, graph: ir.Graph) -> ir.Node | None:
        """The product that makes the logits: the last one before the output."""
        value = next((v for v in graph.outputs if v.name == self._head_output), None)
        while value is not None:
            node = value.producer()
            if node is None or node.op_type == "MatMul":
                return node
            value = node.inputs[0]
        return None

    def _quantize_product(self, graph: ir.Graph, node: ir.Node) -> None:
        weight, transposed = weight_of(node)
        if weight is None or weight.const_value is None or match.rank(weight) != 2:
            return
        tensor = weight.const_value
        block = fitting_block(int(tensor.shape[1 if transposed else 0]), self.settings.block_size)
        if tensor.size < MIN_ELEMENTS or block == 0:
            self.skipped.append(weight.name or "")
            return
        blocks = _LazyBlocks(tensor, transposed, replace(self.settings, block_size=block))
        name = f"{weight.name}.T" if transposed else weight.name
        parts = [
            match.add_initializer(graph, f"{name}.{suffix}", part) for suffix, part in blocks.tensors(str(name)).items()
        ]
        dequantize = ir.node(
            "DequantizeLinear",
            parts,
            attributes={"axis": 0, "block_size": block} if block else {"axis": 1},
            num_outputs=1,
            name=self._name(f"{name}/DequantizeLinear"),
        )
        out = dequantize.outputs[0]
        out.shape, out.type = ir.Shape(blocks.shape), ir.TensorType(tensor.dtype)
        match.insert_before(node, [dequantize])
        node.replace_input_with(1, out)
        self.quantized.append(str(name))

    def _quantize_embedding(self, graph: ir.Graph, node: ir.Node) -> None:
        table, ids = node.inputs
        if table is None or ids is None or not table.is_initializer() or match.rank(table) != 2:
            return
        tensor = table.const_value
        width = int(tensor.shape[1])
        block = fitting_block(width, self.settings.block_size or TABLE_BLOCK)
        if tensor.size < MIN_ELEMENTS or not block or width <= block or not tensor.dtype.is_floating_point():
            return
        blocks = _LazyBlocks(tensor, True, BlockQuantization(8, block))
        rows = {k: _transposed_rows(v) for k, v in blocks.tensors(f"{table.name}.rows").items()}
        gathered = []
        for suffix, part in rows.items():
            value = match.add_initializer(graph, f"{table.name}.rows.{suffix}", part)
            gather = ir.node("Gather", [value, ids], num_outputs=1, name=self._name(f"{table.name}.{suffix}/Gather"))
            gather.outputs[0].shape = ir.Shape([*list(ids.shape), int(part.shape[1])])
            gather.outputs[0].type = ir.TensorType(part.dtype)
            gathered.append(gather)
        dequantize = ir.node(
            "DequantizeLinear",
            [g.outputs[0] for g in gathered],
            attributes={"axis": len(ids.shape), "block_size": block},
            num_outputs=1,
            name=self._name(f"{table.name}/DequantizeLinear"),
        )
        match.insert_before(node, [*gathered, dequantize])
        match.replace_value(node.outputs[0], dequantize.outputs[0])
        self.quantized.append(f"{table.name}.rows")

    def _name(self, wanted: str) -> str:
        """A name no node has yet: a weight may be used several times, as in an unrolled loop."""
        self._named[wanted] += 1
        return wanted if self._named[wanted] == 1 else f"{wanted}.{self._named[wanted]}"


def weight_of(product: ir.Node) -> tuple[ir.Value | None, bool]:
    """The second operand of a product, and whether it is the transpose of the value returned."""
    weight = product.inputs[1]
    transpose = match.producer(weight, "Transpose")
    if transpose is not None and transpose.inputs[0] is not None and transpose.inputs[0].is_initializer():
        return transpose.inputs[0], True
    return weight, False


class _LazyBlocks:
    """Quantizes one weight when the first of its tensors is written, and forgets it after the last."""

    def __init__(self, tensor: ir.TensorProtocol, transposed: bool, settings: BlockQuantization) -> None:
        self._tensor, self._transposed, self._settings = tensor, transposed, settings
        rows, columns = (int(d) for d in tensor.shape)
        self.shape = (columns, rows) if transposed else (rows, columns)
        self._done: dict[str, np.ndarray] = {}

    def tensors(self, name: str) -> dict[str, ir.LazyTensor]:
        """Weight, scale and (asymmetric 4-bit) zero point, in the input order of ``DequantizeLinear``."""
        depth, width = self.shape
        block = self._settings.block_size
        scales = (depth // block, width) if block else (width,)
        four = self._settings.bits == 4
        kinds: dict[str, tuple[tuple[int, ...], ir.DataType]] = {
            "weight_q": ((depth, width), _integer_type(self._settings)),
            "weight_scale": (scales, self._tensor.dtype),
        }
        if four and not self._settings.symmetric:
            kinds["weight_zero_point"] = (scales, ir.DataType.UINT4)
        return {
            suffix: ir.LazyTensor(
                functools.partial(self._evaluate, suffix, f"{name}.{suffix}"),
                dtype=dtype,
                shape=ir.Shape(shape),
                name=f"{name}.{suffix}",
            )
            for suffix, (shape, dtype) in kinds.items()
        }

    def _evaluate(self, suffix: str, name: str) -> ir.Tensor[np.ndarray]:
        array = self._tensor.numpy()
        weight = np.ascontiguousarray(array.T if self._transposed else array, dtype=np.float32)
        parts = quantize_blocks(weight, self._settings)
        if suffix == "weight_scale":
            return ir.Tensor(parts[suffix].astype(self._tensor.dtype.numpy()), name=name)
        return ir.Tensor(parts[suffix], dtype=_integer_type(self._settings), name=name)


def _integer_type(settings: BlockQuantization) -> ir.DataType:
    if settings.bits == 8:
        return ir.DataType.INT8
    return ir.DataType.INT4 if settings.symmetric else ir.DataType.UINT4


def _transposed_rows(tensor: ir.LazyTensor) -> ir.LazyTensor:
    """[blocks of width, rows] as [rows, blocks of width], still lazy."""
    shape = ir.Shape([int(tensor.shape[1]), int(tensor.shape[0])])

    def evaluate() -> ir.Tensor[np.ndarray]:
        return ir.Tensor(np.ascontiguousarray(tensor.numpy().T), dtype=tensor.dtype, name=tensor.name)

    return ir.LazyTensor(evaluate, dtype=tensor.dtype, shape=shape, name=tensor.name)


def quantize_blocks(weight: np.ndarray, settings: BlockQuantization) -> dict[str, np.ndarray]:
    """Quantize float32 [in, out] along its first axis.

    Returns ``weight_q`` (int8, int4 or uint4) [in, out], ``weight_scale`` float32 [in / block, out] and, for
    asymmetric 4-bit, ``weight_zero_point`` [in / block, out]. The first axis must be a multiple of the block size.
    Without a block size scales are [out].
    """
    depth, width = weight.shape
    block = settings.block_size
    if block is None:
        scale = np.abs(weight).max(axis=0) / np.float32(COLUMN_STEPS)
        steps = np.divide(weight, scale, out=np.zeros_like(weight), where=scale > 0)
        return {"weight_q": np.rint(steps).astype(np.int8), "weight_scale": scale}
    if settings.bits == 8:
        grouped = weight.reshape(depth // block, block, width)
        scale = np.abs(grouped).max(axis=1) / 127.0
        steps = np.divide(grouped, scale[:, None], out=np.zeros_like(grouped), where=scale[:, None] > 0)
        return {"weight_q": np.rint(steps).astype(np.int8).reshape(depth, width), "weight_scale": scale}
    from onnxruntime.capi._pybind_state import quantize_qdq_matmul_4bits

    groups = depth // block
    packed = np.zeros((depth * width + 1) // 2, dtype=np.uint8)
    points = np.zeros((groups * width + 1) // 2, dtype=np.uint8)
    scale = np.zeros((groups, width), dtype=np.float32)
    quantize_qdq_matmul_4bits(packed, weight, scale, points, block, width, depth, settings.symmetric)
    dtype = ml_dtypes.int4 if settings.symmetric else ml_dtypes.uint4
    parts = {"weight_q": _unpack(packed, depth * width, dtype).reshape(depth, width), "weight_scale": scale}
    if not settings.symmetric:
        parts["weight_zero_point"] = _unpack(points, groups * width, ml_dtypes.uint4).reshape(groups, width)
    return parts


def _unpack(packed: np.ndarray, count: int, dtype: type) -> np.ndarray:
    """Two 4-bit values a byte, low half first, as one value an element."""
    nibbles = np.empty(packed.size * 2, dtype=np.int8)
    nibbles[0::2], nibbles[1::2] = packed & 0xF, packed >> 4
    if dtype is ml_dtypes.int4:
        nibbles = ((nibbles ^ 8) - 8).astype(np.int8)
    return nibbles[:count].astype(dtype)
