"""Packed weights turn back into what they were made of: in numpy, and in ONNX Runtime's standard operators."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_export.passes import kernel_layouts as layouts
from dspark_export.passes.kernel_layouts import Layout
from dspark_export.passes.packed_weights import exact_type

FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
INTEGERS = (ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT4, ir.DataType.UINT4)


def _numbers(layout: Layout, lead: tuple[int, ...] = ()) -> np.ndarray:
    rng = np.random.default_rng(layout.depth * 1000 + layout.width)
    shape = (*lead, layout.width, layout.depth) if layout.transposed else (*lead, layout.depth, layout.width)
    if not layout.is_integer:
        return rng.standard_normal(shape).astype(layout.dtype.numpy()).astype(layout.plain_dtype.numpy())
    bits = 4 if layout.nibbles else 8
    low = -(1 << (bits - 1)) if layout.offset else 0
    return rng.integers(low, low + (1 << bits), shape).astype(layout.dtype.numpy())


@st.composite
def _layouts(draw: st.DrawFn) -> Layout:
    width, kind = draw(st.integers(1, 70)), draw(st.sampled_from(["floats", "blocks", "columns", "scales"]))
    if kind == "floats":
        dtype, turned = draw(st.sampled_from(FLOATS)), draw(st.booleans())
        wide = dtype != ir.DataType.FLOAT and draw(st.booleans())
        return layouts.tiles_of_floats(draw(st.integers(1, 40)), width, dtype, turned, wide=wide)
    if kind == "columns":
        return layouts.tiles_of_columns(draw(st.integers(1, 40)), width)
    if kind == "scales":
        return layouts.tiles_of_scales(draw(st.integers(1, 9)), width, draw(st.sampled_from(FLOATS)))
    block = draw(st.sampled_from([16, 32, 64]))
    return layouts.tiles_of_blocks(block * draw(st.integers(1, 3)), width, draw(st.sampled_from(INTEGERS)), block)


def test_the_type_that_holds_numbers_exactly() -> None:
    rng = np.random.default_rng(0)
    numbers = rng.standard_normal((40, 50)).astype(np.float32)
    assert exact_type(numbers) == ir.DataType.FLOAT
    for dtype in (ir.DataType.BFLOAT16, ir.DataType.FLOAT16):
        rounded = numbers.astype(dtype.numpy()).astype(np.float32)
        assert exact_type(rounded) == dtype
        rounded[-1, -1] = 1 + 2**-20
        assert exact_type(rounded) == ir.DataType.FLOAT
    assert exact_type(np.float32([[1e9]]) * np.float32([[1 + 2**-9]])) == ir.DataType.FLOAT  # float16 ends at 65504


@settings(max_examples=150, deadline=None)
@given(layout=_layouts())
def test_numpy_gives_back_what_was_packed(layout: Layout) -> None:
    array = _numbers(layout)
    packed = layout.pack(array)
    assert packed.shape == layout.packed_shape
    assert np.array_equal(layout.unpack(packed), array)


@pytest.mark.parametrize(
    "layout",
    [
        layouts.tiles_of_floats(7, 37, ir.DataType.FLOAT),
        layouts.tiles_of_floats(7, 37, ir.DataType.FLOAT, transposed=True),
        layouts.tiles_of_floats(5, 20, ir.DataType.BFLOAT16),
        layouts.tiles_of_floats(6, 20, ir.DataType.FLOAT16),
        layouts.tiles_of_floats(6, 20, ir.DataType.FLOAT16, wide=True),
        layouts.tiles_of_floats(5, 20, ir.DataType.BFLOAT16, transposed=True, wide=True),
        layouts.tiles_of_blocks(64, 37, ir.DataType.INT8, 32),
        layouts.tiles_of_blocks(64, 37, ir.DataType.INT4, 32),
        layouts.tiles_of_blocks(32, 16, ir.DataType.UINT4, 16),
        layouts.tiles_of_columns(10, 18),
        layouts.tiles_of_scales(3, 18, ir.DataType.FLOAT),
    ],
    ids=lambda layout: (
        f"{layout.dtype.name}-{layout.depth}x{layout.width}{'-turned' * layout.transposed}{'-wide' * layout.wide}"
    ),
)
@pytest.mark.parametrize("lead", [(), (3,)], ids=["matrix", "experts"])
def test_standard_operators_give_back_what_was_packed(layout: Layout, lead: tuple[int, ...]) -> None:
    array = _numbers(layout, lead)
    packed = ir.tensor(ir.Tensor(layout.pack(array), dtype=layout.packed_dtype, name="packed"))
    source = ir.Value(name="packed", shape=ir.Shape(packed.shape), type=ir.TensorType(packed.dtype), const_value=packed)
    graph = ir.Graph([], [], nodes=[], initializers=[source], opset_imports={"": 24}, name="unpacked")
    nodes = layout.unpack_nodes(graph, source, "w", lead)
    wide = ir.node("Cast", [nodes[-1].outputs[0]], attributes={"to": int(ir.DataType.FLOAT)}, num_outputs=1)
    wide.outputs[0].name, wide.outputs[0].type = "out", ir.TensorType(ir.DataType.FLOAT)
    wide.outputs[0].shape = ir.Shape(array.shape)
    graph.extend([*nodes, wide])
    graph.outputs.append(wide.outputs[0])
    session = ort.InferenceSession(ir.to_proto(ir.Model(graph, ir_version=11)).SerializeToString())
    (found,) = session.run(None, {})
    assert np.array_equal(found, array.astype(np.float32))
