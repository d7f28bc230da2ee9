"""What of a checkpoint reaches the graphs: everything stored is taken, unread for a known reason, or an error.

GGUF files and safetensors folders both go through :class:`Inventory`: a tensor or a setting that nobody takes would
otherwise change the numbers of a model without a word.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from dspark_runtime.errors import InvalidWeights

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
_SHOWN = 4


class Inventory:
    """The names a checkpoint holds; each must be taken or excused."""

    def __init__(self, names: Iterable[str]) -> None:
        self._left = dict.fromkeys(names)
        self._unread: dict[str, str] = {}

    def take(self, *names: str) -> None:
        """These become part of the model or its config."""
        for name in names:
            self._left.pop(name, None)

    def excuse(self, name: str, reason: str) -> None:
        """This one is not used, which is right for ``reason``."""
        self._left.pop(name, None)
        self._unread[generic(name)] = reason

    @property
    def left(self) -> list[str]:
        """Names that were neither taken nor excused, in the checkpoint's order."""
        return list(self._left)

    @property
    def unread(self) -> dict[str, str]:
        """What is excused, with numbers in names replaced by ``*``, and why."""
        return dict(sorted(self._unread.items()))

    def close(self, checkpoint: str, what: str, advice: str) -> None:
        """InvalidWeights if something is left."""
        if self.left:
            raise InvalidWeights(
                f"{checkpoint} holds {len(self.left)} {what} that the model would not use: {some(self.left)}; {advice}"
            )


def generic(name: str) -> str:
    """``name`` with its numbers replaced by ``*``: one name for all layers."""
    return _NUMBER.sub("*", name)


def some(names: Iterable[str], limit: int = _SHOWN) -> str:
    """The first of ``names``, one per kind, for a message."""
    kinds: dict[str, str] = {}
    for name in names:
        kinds.setdefault(generic(name), name)
    shown = list(kinds.values())
    return ", ".join(shown[:limit]) + (f" and {len(shown) - limit} more kinds" if len(shown) > limit else "")


MEDIA_PARTS = re.compile(
    r"^(?:(?!(?:layers|h|blocks)\.\d)[^.]+\.)*?"
    r"(vision_tower|vision_model|vision_encoder|visual|vit|image_newline|multi_modal_projector|mm_projector|"
    r"connector|modality_projection|embed_vision|embed_audio|audio_tower|audio_model|audio_encoder|audio|patch_merger)"
    r"(\.|$)"
)
"""Names of weights that read images or sound; inside a layer of the decoder none does."""

READS_MEDIA = "reads images or sound; the bundle takes text only"

_MTP = re.compile(r"(^|\.)mtp\w*\.")
_MTP_LAYER_PARTS = ("eh_proj", "enorm", "hnorm", "shared_head")
_LAYER = re.compile(r"^(?P<stack>(?:.*\.)?layers)\.(?P<index>\d+)\.(?P<part>[^.]+)")


ABSENT = {"axk1": ("e_score_correction_bias",)}
"""By ``model_type``: ends of weights that published checkpoints lack, which are zero then."""

_UNUSED = {"axk1": {"post_mlp_layernorm.weight": "a norm behind experts; this layer has none"}}
"""By ``model_type``: ends of tensors that published checkpoints have for layers without a use for them."""


def harmless_tensors(shapes: Mapping[str, tuple[int, ...]], layers: int, kind: str = "") -> dict[str, str]:
    """Tensors of a safetensors checkpoint that may stay unread, with the reason: rules, not a list of models.

    Args:
        shapes: all stored tensors.
        layers: how many decoder layers the config has.
        kind: its ``model_type``.
    """
    extra = {
        match["index"]
        for name in shapes
        if (match := _LAYER.match(name)) and int(match["index"]) >= layers and match["part"] in _MTP_LAYER_PARTS
    }
    found = {}
    for name, shape in shapes.items():
        unused = (reason for ending, reason in _UNUSED.get(kind, {}).items() if name.endswith(ending))
        if reason := next(unused, None) or _why_harmless(name, shape, extra):
            found[name] = reason
    return found


def _why_harmless(name: str, shape: tuple[int, ...], prediction_layers: set[str]) -> str | None:
    layer = _LAYER.match(name)
    if _MTP.search(name) or (layer and layer["index"] in prediction_layers):
        return "multi-token prediction: drafts tokens, and has no part in the model's own logits"
    if name.endswith((".inv_freq", ".rotary_emb.cos_cached", ".rotary_emb.sin_cached")):
        return "rotary frequencies, which follow from the config"
    if name.endswith("position_ids"):
        return "a counter of positions"
    if name.endswith((".attn.bias", ".attention.bias", ".attn.masked_bias", ".attention.masked_bias")):
        square = len(shape) > 1 and shape[-1] == shape[-2]
        return "a causal mask, not a bias" if square or shape in ((), (1,)) else None
    if MEDIA_PARTS.search(name):
        return READS_MEDIA
    if name.startswith(("v_head.", "value_head.")):
        return "a value head of reinforcement learning"
    if name.endswith((".k_scale", ".v_scale", ".kv_scale", ".q_scale", ".k_proj.output_scale", ".v_proj.output_scale")):
        return "the scale of a quantized cache; the bundle's cache is not quantized"
    return None
