"""Parts that block drafters and EAGLE-3 share: weights by name, norms, rotary embedding, masks of windows."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn import functional

from dspark_export.drafts.formats.draft import DraftLayers
from dspark_runtime.errors import InvalidConfig

Weights = Mapping[str, torch.Tensor]
Turn = tuple[torch.Tensor, torch.Tensor]
"""Cosine and sine of every row's rotation, each [batch, rows, head_dim]."""


def keep(owner: torch.nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Make ``tensor`` a parameter of ``owner`` under a dotted ``name``, which is what the graph will call it."""
    *path, last = name.split(".")
    for part in path:
        if part not in dict(owner.named_children()):
            owner.add_module(part, torch.nn.Module())
        owner = owner.get_submodule(part)
    owner.register_parameter(last, torch.nn.Parameter(tensor, requires_grad=False))


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, epsilon: float) -> torch.Tensor:
    """x / rms(x) * weight over the last axis, the mean in float32; without ``weight`` the norm alone."""
    wide = x.float()
    normed = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)).to(x.dtype)
    return normed if weight is None else weight * normed


def softcapped(logits: torch.Tensor, cap: float | None) -> torch.Tensor:
    """``cap * tanh(logits / cap)``; the logits themselves without a cap."""
    return logits if cap is None else torch.tanh(logits / cap) * cap


def inverse_frequencies(layers: DraftLayers) -> tuple[torch.Tensor, float]:
    """float32 [head_dim / 2] rotation per position, and the factor on cosine and sine, as transformers has them."""
    from transformers import PretrainedConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    given = dict(layers.rope.parameters or {})
    kind = str(given.get("rope_type", given.get("type", "default")))
    if kind == "default":
        exponents = torch.arange(0, layers.head_dim, 2, dtype=torch.int64).float() / layers.head_dim
        return 1.0 / layers.rope.theta**exponents, 1.0
    if kind not in ROPE_INIT_FUNCTIONS or kind in ("dynamic", "longrope"):
        raise InvalidConfig(
            f"rotary embedding {kind!r} of the draft is not supported; default, linear, llama3, yarn and "
            "proportional are"
        )
    config = PretrainedConfig(
        hidden_size=layers.hidden_size,
        num_attention_heads=layers.heads,
        head_dim=layers.head_dim,
        max_position_embeddings=layers.max_positions,
        rope_parameters={**given, "rope_theta": layers.rope.theta, "partial_rotary_factor": layers.rope.partial},
    )
    frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    return frequencies.float(), float(factor)


class Rotation(torch.nn.Module):
    """Cosine and sine of positions, in float32 and then in the type of the draft."""

    frequencies: torch.Tensor

    def __init__(self, layers: DraftLayers, dtype: torch.dtype) -> None:
        super().__init__()
        frequencies, self._factor = inverse_frequencies(layers)
        self._dtype = dtype
        self.register_buffer("frequencies", frequencies)

    def forward(self, positions: torch.Tensor) -> Turn:
        """Tables for ``positions`` int64 [batch, rows]."""
        angles = positions[..., None].float() * self.frequencies
        angles = torch.cat((angles, angles), -1)
        cosine, sine = angles.cos(), angles.sin()
        if self._factor != 1.0:
            cosine, sine = cosine * self._factor, sine * self._factor
        return cosine.to(self._dtype), sine.to(self._dtype)


def rotate(x: torch.Tensor, turn: Turn) -> torch.Tensor:
    """``x`` [batch, heads, rows, head_dim] with rotate-half pairs (i, i + head_dim / 2) turned."""
    cosine, sine = (part.unsqueeze(1) for part in turn)
    half = x.shape[-1] // 2
    return x * cosine + torch.cat((-x[..., half:], x[..., :half]), -1) * sine


def heads_of(x: torch.Tensor, width: int) -> torch.Tensor:
    """[batch, rows, heads * width] to [batch, heads, rows, width]."""
    return x.reshape(x.shape[0], x.shape[1], -1, width).transpose(1, 2)


class Linear:
    """``x @ weight.T + bias`` of a named layer; ``owner`` holds the parameters."""

    def __init__(self, owner: torch.nn.Module, weights: Weights, name: str) -> None:
        self._owner, self._name = owner, name
        self._has_bias = f"{name}.bias" in weights
        for part in ("weight", "bias") if self._has_bias else ("weight",):
            keep(owner, f"{name}.{part}", weights[f"{name}.{part}"])

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        weight = self._owner.get_parameter(f"{self._name}.weight")
        bias = self._owner.get_parameter(f"{self._name}.bias") if self._has_bias else None
        return functional.linear(x, weight, bias)


class Norm:
    """The RMS norm of a name, without a weight where ``weights`` have none."""

    def __init__(self, owner: torch.nn.Module, weights: Weights, name: str, epsilon: float) -> None:
        self._owner, self._epsilon = owner, epsilon
        self._name = f"{name}.weight" if f"{name}.weight" in weights else None
        if self._name is not None:
            keep(owner, self._name, weights[self._name])

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        weight = None if self._name is None else self._owner.get_parameter(self._name)
        return rms_norm(x, weight, self._epsilon)
