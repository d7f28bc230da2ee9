"""Parts that block drafters and EAGLE-3 share: norms, rotary embedding, feed-forward, masks by layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch.nn import functional

from dspark_export.checkpoints.drafts.draft import DraftLayers
from dspark_runtime.errors import InvalidConfig

Weights = Mapping[str, torch.Tensor]

_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "swish": functional.silu,
    "gelu": functional.gelu,
    "gelu_pytorch_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
}


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, epsilon: float) -> torch.Tensor:
    """x / rms(x) * weight over the last axis, the mean in float32; without ``weight`` the norm alone."""
    wide = x.float()
    normed = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)).to(x.dtype)
    return normed if weight is None else weight * normed


def activation(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """The activation a config names; InvalidConfig for one that is not known."""
    if name not in _ACTIVATIONS:
        raise InvalidConfig(f"activation {name!r} of the draft is unknown; known are {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


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
            f"rotary embedding {kind!r} of the draft is not supported; default, linear, llama3 and yarn are"
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


def rotation(positions: torch.Tensor, frequencies: torch.Tensor, factor: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine [batch, 1, rows, head_dim] for ``positions`` [batch, rows]."""
    angles = positions[..., None].float() * frequencies
    angles = torch.cat((angles, angles), -1)[:, None]
    return angles.cos() * factor, angles.sin() * factor


def rotate(x: torch.Tensor, turn: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """``x`` [batch, heads, rows, head_dim] with rotate-half pairs (i, i + head_dim / 2) turned."""
    cosine, sine = (part.to(x.dtype) for part in turn)
    left, right = x.chunk(2, -1)
    return x * cosine + torch.cat((-right, left), -1) * sine


def heads_of(x: torch.Tensor, width: int) -> torch.Tensor:
    """[batch, rows, heads * width] to [batch, heads, rows, width]."""
    return x.reshape(x.shape[0], x.shape[1], -1, width).transpose(1, 2)


class Linear:
    """``x @ weight.T + bias`` with weights looked up by name."""

    def __init__(self, owner: torch.nn.Module, weights: Weights, name: str) -> None:
        self._owner, self._name = owner, name.replace(".", "_")
        for part in ("weight", "bias"):
            found = weights.get(f"{name}.{part}")
            if found is not None:
                owner.register_parameter(f"{self._name}_{part}", torch.nn.Parameter(found, requires_grad=False))
        self._has_bias = f"{name}.bias" in weights

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        weight = getattr(self._owner, f"{self._name}_weight")
        bias = getattr(self._owner, f"{self._name}_bias") if self._has_bias else None
        return functional.linear(x, weight, bias)
