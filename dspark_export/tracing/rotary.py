"""Keeps transformers from recomputing rotary frequencies while a text grows."""

from __future__ import annotations

from typing import TypeVar

import torch

Model = TypeVar("Model", bound=torch.nn.Module)


def make_rope_static(model: Model) -> Model:
    """Keep the rotary frequencies the model was made with: it is only run at lengths they are right for."""
    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        if isinstance(kind, dict):
            module.rope_type = {layer: _static_name(one) for layer, one in kind.items()}  # type: ignore[assignment]
        elif isinstance(kind, str):
            module.rope_type = _static_name(kind)  # type: ignore[assignment]
    return model


def _static_name(kind: str) -> str:
    return "default" if kind in ("dynamic", "longrope") else kind
