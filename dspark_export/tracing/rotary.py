"""Rotary embeddings written with complex numbers, which ONNX does not have, in real arithmetic.

Only deepseek_v2 is written that way among the supported architectures. Its rotary table and its application are
replaced together while a model is traced: the table becomes [batch, tokens, dim/2, 2] (cosine, sine) instead of a
complex [batch, tokens, dim/2], and the rotation of neighbouring pairs is spelled out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as deepseek_v2


@contextmanager
def real_rotary(model: PreTrainedModel) -> Iterator[None]:
    """While active, ``model`` computes rotary embeddings without complex numbers (if it ever did)."""
    tables = [m for m in model.modules() if isinstance(m, deepseek_v2.DeepseekV2RotaryEmbedding)]
    if not tables:
        yield
        return
    apply = deepseek_v2.apply_rotary_emb
    deepseek_v2.apply_rotary_emb = _rotate_pairs
    for table in tables:
        table.forward = _table.__get__(table)
    try:
        yield
    finally:
        deepseek_v2.apply_rotary_emb = apply
        for table in tables:
            del table.forward


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
