"""Custom operators that stand for standard ONNX operators while a model is traced.

Each has an eager PyTorch implementation with the meaning of the ONNX operator it becomes, so a seamed model runs in
PyTorch and is the numerical reference of its own graph.

| operator | becomes (opset 24) |
|---|---|
| ``dspark::attention`` | ``Attention`` with a bool mask, grouped heads, optional softcap |
| ``dspark::tensor_scatter`` | ``TensorScatter`` on axis 2, linear |
| ``dspark::cache_view`` | ``Shape`` of the mask, ``Slice`` of the cache to its last dimension |
| ``dspark::gather_rows`` | ``GatherND`` with one batch dimension |
| ``dspark::grouped_linear``, ``dspark::grouped_product`` | a ``Loop`` over the chosen experts, see ``experts.py`` |
| ``dspark::layer_output`` | a marker node, removed when graphs are cut from the trace |
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx
import torch
from onnxscript.values import Op, Opset

from dspark_export.tracing.experts import TRACE_DOMAIN, grouped_linear_body, grouped_product_body
from dspark_runtime.bundle.contract import OPSET

LAYER_OUTPUT, LAYER_NUMBER = "LayerOutput", "layer"

_onnx = Opset("", OPSET)


def _internal(name: str, inputs: tuple[str, ...], attributes: tuple[str, ...] = ()) -> Op:
    """An operator that exists between translation and the end of tracing only; integers are its only attributes."""
    schema = onnx.defs.OpSchema
    floats = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]
    return Op(
        Opset(TRACE_DOMAIN, 1),
        name,
        schema(
            name,
            TRACE_DOMAIN,
            1,
            inputs=[schema.FormalParameter(given, "tensor(int64)" if given == "expert" else "T") for given in inputs],
            outputs=[schema.FormalParameter("out", "T")],
            type_constraints=[("T", floats, "the model's type")],
            attributes=[schema.Attribute(given, schema.AttrType.INT) for given in attributes],
        ),
    )


_layer_output = _internal(LAYER_OUTPUT, ("hidden",), (LAYER_NUMBER,))
_grouped_linear = _internal("grouped_linear_body", ("rows", "weight", "expert"))
_grouped_product = _internal("grouped_product_body", ("rows", "weight", "expert"))


@torch.library.custom_op("dspark::attention", mutates_args=())
def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    softcap: float = 0.0,
) -> torch.Tensor:
    """Attention of ``query`` [batch, heads, tokens, key_dim] over ``key``/``value`` [batch, kv_heads, kv_len, dim].

    ``mask`` is bool [batch or 1, 1, tokens, kv_len], true where a row may attend. ``softcap`` 0 means none; otherwise
    scores become ``softcap * tanh(score / softcap)`` before the mask. Returns [batch, heads, tokens, value_dim].
    """
    batch, heads, tokens, _ = query.shape
    kv_heads = key.shape[1]
    grouped = query.reshape(batch, kv_heads, heads // kv_heads * tokens, -1)  # heads that share keys, side by side
    scores = (torch.matmul(grouped, key.transpose(2, 3)) * scale).view(batch, heads, tokens, -1)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, float("-inf"))
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(value.dtype)
    return torch.matmul(weights.view(*grouped.shape[:3], -1), value).view(batch, heads, tokens, -1)


@attention.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    softcap: float = 0.0,
) -> torch.Tensor:
    return query.new_empty(query.shape[0], query.shape[1], query.shape[2], value.shape[3])


@torch.library.custom_op("dspark::tensor_scatter", mutates_args=())
def tensor_scatter(past: torch.Tensor, update: torch.Tensor, write_indices: torch.Tensor) -> torch.Tensor:
    """``past`` [batch, kv_heads, capacity, dim] with ``update`` written at slot ``write_indices[b]`` of sequence b."""
    present = past.clone()
    for row, start in enumerate(write_indices.tolist()):
        present[row, :, start : start + update.shape[2]] = update[row]
    return present


@tensor_scatter.register_fake
def _(past: torch.Tensor, update: torch.Tensor, write_indices: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(past)


@torch.library.custom_op("dspark::cache_view", mutates_args=())
def cache_view(present: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The slots of ``present`` [batch, kv_heads, capacity, dim] that ``mask`` [..., kv_len] speaks of: the first."""
    return present[:, :, : mask.shape[-1]].clone()


@cache_view.register_fake
def _(present: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return present.new_empty(present.shape[0], present.shape[1], mask.shape[-1], present.shape[3])


@torch.library.custom_op("dspark::gather_rows", mutates_args=())
def gather_rows(hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Row ``rows[b, r]`` of sequence b for all r: [batch, tokens, width] and [batch, rows] to [batch, rows, width]."""
    return torch.gather(hidden, 1, rows.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))


@gather_rows.register_fake
def _(hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return hidden.new_empty(rows.shape[0], rows.shape[1], hidden.shape[2])


@torch.library.custom_op("dspark::layer_output", mutates_args=())
def layer_output(hidden: torch.Tensor, layer: int) -> torch.Tensor:
    """``hidden`` itself, marked as the raw output of decoder layer ``layer`` (-1: of the embedding)."""
    return hidden.clone()


@layer_output.register_fake
def _(hidden: torch.Tensor, layer: int) -> torch.Tensor:
    return torch.empty_like(hidden)


def _onnx_attention(query: Any, key: Any, value: Any, mask: Any, scale: float, softcap: float = 0.0) -> Any:
    if softcap:
        return _onnx.Attention(query, key, value, mask, scale=scale, softcap=softcap)[0]
    return _onnx.Attention(query, key, value, mask, scale=scale)[0]


def _onnx_tensor_scatter(past: Any, update: Any, write_indices: Any) -> Any:
    return _onnx.TensorScatter(past, update, write_indices, axis=2, mode="linear")


def _onnx_cache_view(present: Any, mask: Any) -> Any:
    kv_len = _onnx.Shape(mask, start=3, end=4)
    start = _onnx.Constant(value_ints=[0])
    axis = _onnx.Constant(value_ints=[2])
    return _onnx.Slice(present, start, kv_len, axis)


def _onnx_gather_rows(hidden: Any, rows: Any) -> Any:
    return _onnx.GatherND(hidden, _onnx.Unsqueeze(rows, _onnx.Constant(value_ints=[-1])), batch_dims=1)


def _onnx_layer_output(hidden: Any, layer: int) -> Any:
    return _layer_output(hidden, layer=layer)


TRANSLATION: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.dspark.attention.default: _onnx_attention,
    torch.ops.dspark.tensor_scatter.default: _onnx_tensor_scatter,
    torch.ops.dspark.cache_view.default: _onnx_cache_view,
    torch.ops.dspark.gather_rows.default: _onnx_gather_rows,
    torch.ops.dspark.layer_output.default: _onnx_layer_output,
    torch.ops.dspark.grouped_linear.default: lambda rows, weight, expert: _grouped_linear(rows, weight, expert),
    torch.ops.dspark.grouped_product.default: lambda rows, weight, expert: _grouped_product(rows, weight, expert),
}

FUNCTIONS = (grouped_linear_body, grouped_product_body)
"""Bodies of internal operators that are more than one standard operator; inlined when tracing is done."""
