"""One decoder layer of a draft, of the Qwen3 or the Gemma 4 kind, over a cache that is updated in place."""

from __future__ import annotations

from typing import NamedTuple

import torch

from dspark_export.drafts.formats.draft import ACTIVATIONS, DraftLayers
from dspark_export.drafts.modules.layers import (
    Linear,
    Norm,
    Turn,
    Weights,
    heads_of,
    keep,
    rms_norm,
    rotate,
)
from dspark_export.tracing import operators  # noqa: F401  (defines torch.ops.dspark)


class Attended(NamedTuple):
    """``rows``: what attention says of the querying rows. ``present_*``: the cache. ``key``, ``value``: new in it."""

    rows: torch.Tensor
    present_key: torch.Tensor
    present_value: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor


class DraftLayer:
    """Layer ``number`` of a draft; its parameters belong to ``owner``, under DeepSpec's names.

    Qwen3: pre-norm, gated feed-forward. Gemma 4: norms before and after both halves, normed values (the key
    projection's where ``k_eq_v``), a scalar on the output. Queries and keys are normed per head where the draft has
    weights for it.
    """

    def __init__(self, owner: torch.nn.Module, layers: DraftLayers, weights: Weights, number: int) -> None:
        self._layers, self._owner = layers, owner
        self._gemma = layers.family == "gemma4"
        prefix = f"layers.{number}."

        def linear(name: str) -> Linear:
            return Linear(owner, weights, prefix + name)

        def norm(name: str) -> Norm:
            return Norm(owner, weights, prefix + name, layers.norm_epsilon)

        self.input_norm = norm("input_layernorm")
        self._q, self._k, self._o = (linear(f"self_attn.{part}_proj") for part in "qko")
        self._v = None if layers.k_eq_v else linear("self_attn.v_proj")
        normed = f"{prefix}self_attn.q_norm.weight" in weights
        self._q_norm, self._k_norm = (norm(f"self_attn.{part}_norm") if normed else None for part in "qk")
        self._after_attention = norm("post_attention_layernorm")
        self._gate, self._up, self._down = (linear(f"mlp.{part}_proj") for part in ("gate", "up", "down"))
        self._activation = ACTIVATIONS[layers.activation]
        self._scalar: str | None = None
        if self._gemma:
            self._before_inner = norm("pre_feedforward_layernorm")
            self._after_inner = norm("post_feedforward_layernorm")
            self._scalar = f"{prefix}layer_scalar"
            keep(owner, self._scalar, weights[self._scalar])

    def attend(
        self,
        asking: torch.Tensor,
        rows: torch.Tensor,
        turns: tuple[Turn, Turn],
        mask: torch.Tensor,
        write_indices: torch.Tensor,
        past: tuple[torch.Tensor, torch.Tensor],
    ) -> Attended:
        """Write keys and values of ``rows`` to the cache and let the rows ``asking`` attend over it under ``mask``.

        ``turns``: rotation of ``asking`` and of ``rows``.
        """
        ops, width = torch.ops.dspark, self._layers.head_dim
        query, raw = heads_of(self._q(asking), width), heads_of(self._k(rows), width)
        key = raw
        if self._q_norm is not None and self._k_norm is not None:
            query, key = self._q_norm(query), self._k_norm(key)
        query, key = rotate(query, turns[0]), rotate(key, turns[1])
        value = raw if self._v is None else heads_of(self._v(rows), width)
        if self._gemma:
            value = rms_norm(value, None, self._layers.norm_epsilon)
        present_key = ops.tensor_scatter(past[0], key, write_indices)
        present_value = ops.tensor_scatter(past[1], value, write_indices)
        seen = ops.cache_view(present_key, mask), ops.cache_view(present_value, mask)
        attended = ops.attention(query, *seen, mask, self._layers.scale, 0.0)
        attended = self._o(attended.transpose(1, 2).flatten(2))
        return Attended(attended, present_key, present_value, key, value)

    def finish(self, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """The layer's output: ``x`` plus attention plus feed-forward."""
        x = x + (self._after_attention(attended) if self._gemma else attended)
        inner = self._before_inner(x) if self._gemma else self._after_attention(x)
        inner = self._down(self._activation(self._gate(inner)) * self._up(inner))
        x = x + (self._after_inner(inner) if self._gemma else inner)
        return x if self._scalar is None else x * self._owner.get_parameter(self._scalar)
