"""What a decoder needs from its cache, observed rather than read from the config.

A copy of the model without weights (meta device) runs one pass; a recording cache notes the shapes ``update`` is
called with and the attention seam's masks tell each layer's window. That covers grouped heads, multi-head latent
attention (a compressed cache with key_dim != value_dim) and per-layer windows with one rule.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from dspark_export.tracing.rotary import make_rope_static
from dspark_export.tracing.seams import SEAM, CacheSeam, Pass, install, seamed
from dspark_runtime.bundle.contract import CacheLayer
from dspark_runtime.errors import UnsupportedArchitecture

_PROBE_TOKENS = 3


class _RecordingCache(CacheSeam):
    def __init__(self, step: Pass) -> None:
        super().__init__({}, step)
        self.shapes: dict[int, tuple[int, int, int]] = {}

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if key.shape[:3] != value.shape[:3]:
            raise UnsupportedArchitecture(
                f"layer {layer_idx} caches keys {tuple(key.shape)} and values {tuple(value.shape)}: heads must agree"
            )
        self.shapes[layer_idx] = (key.shape[1], key.shape[3], value.shape[3])
        return key, value


def skeleton(config: PretrainedConfig) -> PreTrainedModel:
    """The model of ``config`` without weights, with the seams in place."""
    install()
    own = copy.deepcopy(config)
    own.pad_token_id = None  # some models look for padding among the ids, and a meta tensor has none to look at
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(own, attn_implementation=SEAM)
    return make_rope_static(model).eval()


def embedding_scale(model: PreTrainedModel) -> float:
    """What the model multiplies its embeddings with (Gemma), 1 for most."""
    scale = getattr(model.get_input_embeddings(), "embed_scale", None)
    return 1.0 if scale is None else float(scale)


def probe(config: PretrainedConfig) -> tuple[CacheLayer, ...]:
    """The cache of every layer of the model that ``config`` describes.

    Raises:
        UnsupportedArchitecture: a layer keeps no keys and values, or keeps something else besides.
    """
    model = skeleton(config)
    ids = torch.zeros(1, _PROBE_TOKENS, dtype=torch.int64, device="meta")
    mask = torch.ones(1, 1, _PROBE_TOKENS, _PROBE_TOKENS, dtype=torch.bool, device="meta")
    step = Pass(mask, ids, torch.zeros(1, dtype=torch.int64, device="meta"))
    cache, windows = _RecordingCache(step), dict[int, int | None]()

    def note(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        layer, given = getattr(module, "layer_idx", None), kwargs.get("attention_mask")
        if layer is not None and given is not None:
            windows[layer] = step.window_of(given)

    hooks = [
        module.register_forward_pre_hook(note, with_kwargs=True)
        for module in model.modules()
        if isinstance(getattr(module, "layer_idx", None), int)
    ]
    with torch.no_grad(), step.active(), seamed(model):
        model(input_ids=ids, position_ids=ids, past_key_values=cache, use_cache=True)
    for hook in hooks:
        hook.remove()
    layers = range(config.get_text_config().num_hidden_layers)
    if set(cache.shapes) != set(layers):
        missing = sorted(set(layers) - set(cache.shapes))
        raise UnsupportedArchitecture(
            f"{config.model_type}: layers {missing} keep no keys and values of their own, so they cannot be drafted "
            "over; only decoders with a key/value cache in every layer can be exported"
        )
    return tuple(CacheLayer(*cache.shapes[i], windows.get(i)) for i in layers)
