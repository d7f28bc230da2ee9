"""The language model inside a checkpoint that also reads images or sound: its config and the names of its weights.

For text alone such a model runs its decoder as a model of text would; what reads images has no part in it.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from dspark_export.checkpoints.config import MEDIA
from dspark_export.checkpoints.inventory import MEDIA_PARTS, READS_MEDIA
from dspark_export.checkpoints.recipes import Recipe, Recipes
from dspark_export.checkpoints.rotary import rope_sets
from dspark_runtime.errors import InvalidWeights

if TYPE_CHECKING:
    from transformers import PretrainedConfig

TESTED_WRAPPERS = frozenset(
    [
        *("gemma3", "gemma4", "idefics3", "internvl", "llava", "mistral3"),
        *("qwen2_5_vl", "qwen2_vl", "qwen3_vl", "qwen3_vl_moe", "smolvlm"),
    ]
)
"""``model_type`` of checkpoints whose text part is compared with the whole model in a test."""

_REFUSED_FOR_THEIR_TEXT = frozenset({"gemma3n", "llama4", "qwen3_5", "qwen3_5_moe"})
"""Their text part is opened too: what refuses it is the true reason."""

_SAME_FOR_TEXT = {
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen3_vl_text": "qwen3",
    "qwen3_vl_moe_text": "qwen3_moe",
}
"""Decoders whose three positions are one in a text, which makes them the model of text they came from."""

_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
_RENAMED = (
    (re.compile(r"^(?:model\.)?language_model\.lm_head\."), "lm_head."),
    (
        re.compile(r"^(?:model\.)?(?:language_model|text_model)\.(?:model\.)?(?=layers\.|embed_tokens\.|norm\.)"),
        "model.",
    ),
)


def text_part(config: PretrainedConfig, any_wrapper: bool = False) -> PretrainedConfig:
    """The config of the decoder inside ``config``, or ``config`` itself where it has no such part.

    ``any_wrapper``: also of types without a test.
    """
    text = config.get_text_config()
    known = config.model_type in TESTED_WRAPPERS | _REFUSED_FOR_THEIR_TEXT
    media = any(getattr(config, part, None) is not None for part in MEDIA)
    if text is config or not (known or (media and any_wrapper and _is_decoder(text))):
        return config
    text = copy.deepcopy(text)
    if text.model_type in _SAME_FOR_TEXT:
        text = _as_plain_text(text)
    text.tie_word_embeddings = config.tie_word_embeddings  # the whole model goes by its own
    for name in _SPECIAL:
        ids = getattr(config, name, None)
        if ids is not None and all(token < text.vocab_size for token in (ids if isinstance(ids, list) else [ids])):
            setattr(text, name, ids)
    if hasattr(config, "quantization_config"):
        text.quantization_config = config.quantization_config
    return text


def _is_decoder(text: PretrainedConfig) -> bool:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    return text.model_type in _SAME_FOR_TEXT or type(text) in MODEL_FOR_CAUSAL_LM_MAPPING


def _as_plain_text(text: PretrainedConfig) -> PretrainedConfig:
    from transformers import CONFIG_MAPPING

    values = text.to_dict()
    kind = _SAME_FOR_TEXT[values.pop("model_type")]
    for settings in rope_sets(text):
        for name in ("mrope_section", "mrope_interleaved", "type"):
            settings.pop(name, None)
        if settings.get("rope_type") == "mrope":
            settings["rope_type"] = "default"
    values["rope_parameters"] = text.rope_parameters
    if kind == "qwen3_moe":
        values["norm_topk_prob"] = True  # what Qwen3-VL always does
    plain: PretrainedConfig = CONFIG_MAPPING[kind](**values)
    return plain


def text_weights(recipes: Recipes, config: PretrainedConfig, name: str) -> Recipes:
    """The weights of the decoder under the names of a model of text, without those that read images or sound.

    ``config``: of the decoder.
    """
    weights: dict[str, Recipe] = {}
    excused = dict(recipes.excused)
    for old, recipe in recipes.weights.items():
        if MEDIA_PARTS.search(old):
            excused |= dict.fromkeys(recipe.parts.values(), READS_MEDIA)
            continue
        new = renamed(old)
        if new in weights:
            raise InvalidWeights(f"{name} stores {new!r} twice, once as {old!r}; remove one")
        weights[new] = _turned(new, recipe, config) if config.model_type == "qwen3_moe" else recipe
    return Recipes(weights, excused)


def _turned(name: str, recipe: Recipe, config: PretrainedConfig) -> Recipe:
    """Experts of Qwen3-VL are published as [experts, in, out]; models of text have [experts, out, in]."""
    width, inner = config.hidden_size, config.moe_intermediate_size
    wanted = {"gate_up_proj": (2 * inner, width), "down_proj": (width, inner)}.get(name.rpartition(".experts.")[2])
    if wanted is None or recipe.shape[1:] != wanted[::-1] or wanted[0] == wanted[1]:
        return recipe
    return Recipe((recipe.shape[0], *wanted), recipe.parts, partial(_transposed, recipe))


def _transposed(recipe: Recipe, parts: Mapping[str, Any]) -> Any:
    whole = recipe.make(parts) if recipe.make else parts["weight"]
    return whole.transpose(1, 2).contiguous()


def renamed(name: str) -> str:
    """A weight's name in the model of text: as transformers and others have written it over time."""
    for pattern, prefix in _RENAMED:
        name = pattern.sub(prefix, name)
    return name


def unread_parts(config: PretrainedConfig) -> Mapping[str, Any]:
    """Settings of what is left out, with the reason."""
    return {part: READS_MEDIA for part in MEDIA if getattr(config, part, None) is not None}
