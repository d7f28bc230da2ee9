"""Seams in transformers: attention, masks, cache and experts, each replaced by a form that a graph with an in-place
cache can express. Nothing here knows a model type; the model decides which layer uses which seam how.

One pass is described by a :class:`Pass`. The mask seam reads it from a context variable, because transformers hands
a mask function neither the caller's mask nor its cache.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.moe import ExpertsInterface

from dspark_export.tracing import operators  # noqa: F401  (defines torch.ops.dspark)
from dspark_export.tracing.deepseek import deepseek_forms
from dspark_export.tracing.experts import experts_seam
from dspark_runtime.errors import UnsupportedArchitecture

SEAM = "dspark"

_current: ContextVar[Pass] = ContextVar("dspark_pass")


@dataclass
class Pass:
    """Inputs of one forward pass that the seams need, and the masks derived from them (one per window width).

    ``attention_mask`` bool [batch, 1, tokens, kv_len]; ``position_ids`` and ``write_indices`` int64 [batch, tokens]
    and [batch].
    """

    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    write_indices: torch.Tensor
    masks: dict[int | None, torch.Tensor] = field(default_factory=dict)

    def mask(self, window: int | None) -> torch.Tensor:
        """The mask of layers with this sliding window (None: full attention)."""
        if window not in self.masks:
            allowed = self.attention_mask
            if window is not None:
                allowed = allowed & within_window(self.position_ids, self.write_indices, allowed.shape[-1], window)
            self.masks[window] = allowed
        return self.masks[window]

    def window_of(self, mask: torch.Tensor) -> int | None:
        """Which window the given mask object was made for."""
        return next(window for window, made in self.masks.items() if made is mask)

    @contextmanager
    def active(self) -> Iterator[None]:
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)


def within_window(position_ids: torch.Tensor, write_indices: torch.Tensor, kv_len: int, window: int) -> torch.Tensor:
    """Bool [batch, 1, tokens, kv_len]: the key's position is less than ``window`` before the row's.

    The key in slot s has position s, except the rows of this pass, which sit in slots from ``write_indices`` on and
    have ``position_ids`` (siblings of a tree share a position, so slots say nothing about theirs).
    """
    tokens = position_ids.shape[1]
    slots = torch.arange(kv_len, device=position_ids.device).unsqueeze(0)
    row = slots - write_indices.unsqueeze(1)
    is_new = (row >= 0) & (row < tokens)
    new_positions = torch.gather(position_ids, 1, row.clamp(min=0).minimum(torch.full_like(row, tokens - 1)))
    key_positions = torch.where(is_new, new_positions, slots)
    return (position_ids.unsqueeze(2) - key_positions.unsqueeze(1) < window).unsqueeze(1)


class CacheSeam:
    """What a decoder sees as its cache: ``update`` writes into preallocated memory and returns the visible slots.

    ``past`` maps a layer number to its (key, value) tensors [batch, kv_heads, capacity, dim]; ``present`` collects
    the updated ones. A layer that updates twice or one without memory is a bug of the caller.
    """

    is_compileable = True

    def __init__(self, past: dict[int, tuple[torch.Tensor, torch.Tensor]], step: Pass) -> None:
        self.past, self.step = past, step
        self.present: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ops, mask = torch.ops.dspark, self.step.attention_mask
        past_key, past_value = self.past[layer_idx]
        present_key = ops.tensor_scatter(past_key, key, self.step.write_indices)
        present_value = ops.tensor_scatter(past_value, value, self.step.write_indices)
        self.present[layer_idx] = (present_key, present_value)
        return ops.cache_view(present_key, mask), ops.cache_view(present_value, mask)

    def get_seq_length(self, *args: Any) -> int:
        return 0

    def get_query_offset(self, *args: Any) -> int:
        return 0

    def get_mask_sizes(self, *args: Any) -> tuple[int, int]:
        return self.step.attention_mask.shape[-1], 0


def _attention_seam(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    if position_bias is not None:
        raise UnsupportedArchitecture("a position bias (ALiBi, T5) cannot be carried by the bool attention mask")
    if attention_mask is None:
        raise UnsupportedArchitecture("a layer asks for attention without a mask; its mask cannot carry a token tree")
    scale = float(scaling) if scaling is not None else query.shape[-1] ** -0.5
    if s_aux is not None:
        if softcap:
            raise UnsupportedArchitecture("attention has sinks and a softcap, which would bend the sinks too")
        query, key, value, attention_mask = with_sinks(query, key, value, attention_mask, s_aux / scale)
    out = torch.ops.dspark.attention(query, key, value, attention_mask, scale, float(softcap or 0.0))
    return out.transpose(1, 2), None


_SINK_WIDTH = 8
"""Columns that queries and keys get for a sink: one is used, but kernels want head widths in eights."""


def with_sinks(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, sinks: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention inputs with one more slot, of a value of zeros, whose product with every query is its head's sink.

    Softmax over scores and a sink (gpt-oss) is then plain softmax. Queries [batch, heads, tokens, dim] get a column
    with the sink, keys [batch, kv_heads, kv_len, dim] one of zeros, the new slot a one in it. ``sinks`` [heads]
    have to be divided by the scale of scores.
    """
    batch, heads, tokens, _ = query.shape
    kv_heads, kv_len = key.shape[1], key.shape[2]
    columns = torch.nn.functional.pad(sinks.to(query.dtype).reshape(1, heads, 1, 1), (0, _SINK_WIDTH - 1))
    query = torch.cat([query, columns.expand(batch, heads, tokens, _SINK_WIDTH)], -1)
    slot = torch.nn.functional.pad(key.new_ones(1, 1, 1, 1), (key.shape[3], _SINK_WIDTH - 1))
    key = torch.cat([key, key.new_zeros(batch, kv_heads, kv_len, _SINK_WIDTH)], -1)
    key = torch.cat([key, slot.expand(batch, kv_heads, 1, key.shape[3])], 2)
    value = torch.cat([value, value.new_zeros(batch, kv_heads, 1, value.shape[3])], 2)
    return query, key, value, torch.cat([mask, mask.new_ones(mask.shape[0], mask.shape[1], tokens, 1)], -1)


def _mask_seam(*args: Any, local_size: int | None = None, **kwargs: Any) -> torch.Tensor:
    return _current.get().mask(local_size)


@functools.cache
def install() -> None:
    """Register the seams with transformers under the name ``dspark`` (once per process)."""
    AttentionInterface.register(SEAM, _attention_seam)
    AttentionMaskInterface.register(SEAM, _mask_seam)
    ExpertsInterface.register(SEAM, experts_seam)


@contextmanager
def seamed(model: PreTrainedModel) -> Iterator[None]:
    """While active, ``model`` uses the seams; its own attention and expert implementations come back afterwards."""
    install()
    attention, experts = model.config._attn_implementation, model.config._experts_implementation
    has_experts = model._can_set_experts_implementation()
    model.set_attn_implementation(SEAM)
    if has_experts:
        model.set_experts_implementation(SEAM)
    try:
        with deepseek_forms(model):
            yield
    finally:
        model.set_attn_implementation(attention)
        if has_experts:
            model.config._experts_implementation_internal = experts


def pairs(tensors: Sequence[torch.Tensor], layers: Sequence[int]) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """``[key, value, key, value, ...]`` in the order of ``layers`` as the mapping a :class:`CacheSeam` takes."""
    return {layer: (tensors[2 * n], tensors[2 * n + 1]) for n, layer in enumerate(layers)}
