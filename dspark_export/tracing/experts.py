"""Mixture-of-experts layers: one matrix product per expert that was chosen, over the rows that chose it.

transformers' own traceable form gathers one copy of an expert's matrices for every row and choice; a prefill chunk of
a real model would need tens of gigabytes. Here a ``Loop`` over the chosen experts reads each expert's matrix once and
holds one of them at a time, whatever the number of rows.
"""

from __future__ import annotations

from typing import Any

import torch
from onnxscript import script
from onnxscript.values import Opset

from dspark_runtime.bundle.contract import OPSET

TRACE_DOMAIN = "dspark.trace"
"""Domain of operators that never leave the tracer."""

op = Opset("", OPSET)


@torch.library.custom_op("dspark::grouped_linear", mutates_args=())
def grouped_linear(rows: torch.Tensor, weight: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
    """``rows`` [n, in] through the linear layer of each row's ``expert`` [n]; ``weight`` [experts, out, in]."""
    out = rows.new_empty(rows.shape[0], weight.shape[1])
    for chosen in torch.unique(expert).tolist():
        mine = expert == chosen
        out[mine] = rows[mine] @ weight[chosen].t()
    return out


@grouped_linear.register_fake
def _(rows: torch.Tensor, weight: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[1])


@torch.library.custom_op("dspark::grouped_product", mutates_args=())
def grouped_product(rows: torch.Tensor, weight: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
    """``grouped_linear`` for a model that keeps its matrices the other way round: ``weight`` [experts, in, out]."""
    out = rows.new_empty(rows.shape[0], weight.shape[2])
    for chosen in torch.unique(expert).tolist():
        mine = expert == chosen
        out[mine] = rows[mine] @ weight[chosen]
    return out


@grouped_product.register_fake
def _(rows: torch.Tensor, weight: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[2])


@script(Opset(TRACE_DOMAIN, 1), default_opset=op)
def grouped_linear_body(rows, weight, expert):  # type: ignore[no-untyped-def]  # onnxscript reads annotations itself
    """What ``grouped_linear`` becomes."""
    chosen, _first, _inverse, _counts = op.Unique(expert)
    count = op.Squeeze(op.Shape(chosen))
    size = op.Concat(op.Shape(rows, start=0, end=1), op.Shape(weight, start=1, end=2), axis=0)
    out = op.Expand(op.CastLike(0.0, rows), size)
    for i in range(count):
        number = op.Gather(chosen, i)
        mine = op.Transpose(op.NonZero(op.Equal(expert, number)))
        product = op.Gemm(op.GatherND(rows, mine), op.Gather(weight, number), transB=1)
        out = op.ScatterND(out, mine, product)
    return out


@script(Opset(TRACE_DOMAIN, 1), default_opset=op)
def grouped_product_body(rows, weight, expert):  # type: ignore[no-untyped-def]  # onnxscript reads annotations itself
    """What ``grouped_product`` becomes."""
    chosen, _first, _inverse, _counts = op.Unique(expert)
    count = op.Squeeze(op.Shape(chosen))
    size = op.Concat(op.Shape(rows, start=0, end=1), op.Shape(weight, start=2, end=3), axis=0)
    out = op.Expand(op.CastLike(0.0, rows), size)
    for i in range(count):
        number = op.Gather(chosen, i)
        mine = op.Transpose(op.NonZero(op.Equal(expert, number)))
        product = op.MatMul(op.GatherND(rows, mine), op.Gather(weight, number))
        out = op.ScatterND(out, mine, product)
    return out


def experts_seam(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The experts interface of transformers: ``hidden_states`` [tokens, hidden], the others [tokens, choices]."""
    tokens, choices = top_k_index.shape
    expert = top_k_index.reshape(-1)
    rows = hidden_states.repeat_interleave(choices, dim=0)
    up = "gate_up_proj" if self.has_gate else "up_proj"
    inner = _linear(self, up, rows, expert)
    inner = self._apply_gate(inner) if self.has_gate else self.act_fn(inner)
    out = _linear(self, "down_proj", inner, expert)
    if self.has_post_expert_norm:
        out = self.post_expert_norm(out)
    weighted = out * top_k_weights.reshape(-1, 1)
    return weighted.view(tokens, choices, -1).sum(dim=1).to(hidden_states.dtype)


def _linear(experts: Any, name: str, rows: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
    product = torch.ops.dspark.grouped_product if experts.is_transposed else torch.ops.dspark.grouped_linear
    out: torch.Tensor = product(rows, getattr(experts, name), expert)
    return out + getattr(experts, f"{name}_bias")[expert] if experts.has_bias else out
