"""Rewrites, while tracing, what the DeepSeek models express in ways that ONNX lacks or does badly.

- deepseek_v2 rotates queries and keys with complex numbers, which ONNX lacks. Its rotary table and its application are
  replaced together: the table becomes [batch, tokens, dim/2, 2] (cosine, sine) instead of a complex
  [batch, tokens, dim/2], and the rotation of neighbouring pairs is spelled out.
- deepseek_v2 and deepseek_v3 fill the keys they expand from the latent cache slice by slice, which becomes two scatters
  over the whole cache in every layer. A concatenation gives the same keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as deepseek_v2
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek_v3


@contextmanager
def deepseek_forms(model: PreTrainedModel) -> Iterator[None]:
    """While active, a DeepSeek ``model`` computes the same in operators that can be traced; others are not touched."""
    replaced: list[tuple[torch.nn.Module, str]] = []
    for module in model.modules():
        if isinstance(module, deepseek_v2.DeepseekV2RotaryEmbedding):
            module.forward = _table.__get__(module)
            replaced.append((module, "forward"))
        elif isinstance(module, deepseek_v2.DeepseekV2Attention | deepseek_v3.DeepseekV3Attention):
            module.expand_kv = _expand_latent.__get__(module)
            replaced.append((module, "expand_kv"))
    apply = deepseek_v2.apply_rotary_emb
    if replaced:
        deepseek_v2.apply_rotary_emb = _rotate_pairs
    try:
        yield
    finally:
        deepseek_v2.apply_rotary_emb = apply
        for module, name in replaced:
            delattr(module, name)


def _table(self: deepseek_v2.DeepseekV2RotaryEmbedding, x: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
    angles = position_ids[..., None].float() * self.inv_freq.float()
    table: torch.Tensor = torch.stack((angles.cos(), angles.sin()), dim=-1) * self.attention_scaling
    return table


def _rotate_pairs(query: torch.Tensor, key: torch.Tensor, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = table.unsqueeze(1).unbind(-1)

    def rotate(x: torch.Tensor) -> torch.Tensor:
        even, odd = x.float().reshape(*x.shape[:-1], -1, 2).unbind(-1)
        turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
        return turned.flatten(-2).type_as(x)

    return rotate(query), rotate(key)


def _expand_latent(
    self: deepseek_v2.DeepseekV2Attention, latent: torch.Tensor, rotated: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [batch, heads, slots, dim] of the compressed cache [batch, 1, slots, rank]."""
    batch, _, slots, _ = latent.shape
    expanded = self.kv_b_proj(latent).view(batch, slots, -1, self.qk_nope_head_dim + self.v_head_dim).transpose(1, 2)
    plain, value = torch.split(expanded, [self.qk_nope_head_dim, self.v_head_dim], dim=-1)
    return torch.cat((plain, rotated.expand(-1, plain.shape[1], -1, -1)), dim=-1), value
