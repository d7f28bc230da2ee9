"""Checks config.json before anything is built from it.

transformers accepts nearly any value here and fails much later, or not at all. This module checks the form of the file,
every dimension under its many names, head counts, rotary settings and contradictions; the rest is left to transformers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dspark_export.checkpoints.files import checked_file
from dspark_export.checkpoints.library_calls import first_line, quiet
from dspark_export.checkpoints.rotary import rope_sets
from dspark_export.checkpoints.trust import Trust
from dspark_runtime.errors import CheckpointError, InvalidConfig, ModelNotFound, UnsupportedArchitecture

if TYPE_CHECKING:
    from transformers import PretrainedConfig

CONFIG = "config.json"
GENERATION = "generation_config.json"
INDEX = "model.safetensors.index.json"
MAX_BYTES = 8 * 2**20
MAX_DEPTH = 24
MAX_DIM = 2**31 - 1
MAX_LAYERS = 4096

POSITIONS = ("max_position_embeddings", "n_positions", "max_sequence_length")
"""What configs call the longest text a model was made for."""

MEDIA = ("vision_config", "audio_config", "speech_config", "image_config")
"""Sections of configs of models that read more than text."""

_LAYERS = ("num_hidden_layers", "n_layer", "num_layers")
_HEADS = ("num_attention_heads", "n_head")
_WIDTH = ("hidden_size", "n_embd")
_NEVER_NULL = (*_LAYERS, *_HEADS, *_WIDTH, "vocab_size")
_NULLABLE = (
    *("num_key_value_heads", "head_dim", "intermediate_size", "n_inner", "moe_intermediate_size", "sliding_window"),
    *("max_position_embeddings", "n_positions", "n_ctx", "q_lora_rank", "kv_lora_rank", "qk_rope_head_dim"),
    *("qk_nope_head_dim", "v_head_dim", "num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok"),
)
_MAY_BE_ZERO = (  # written for "none" by published dense checkpoints of expert families, and by transformers
    *("sliding_window", "num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok"),
    *("moe_intermediate_size", "shared_expert_intermediate_size"),
)
_PER_LAYER = ("intermediate_size",)  # may be a list, one for each layer
_POSITIVE_FLOATS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "rope_theta", "query_pre_attn_scalar")
_FINITE_FLOATS = ("attn_logit_softcapping", "final_logit_softcapping", "partial_rotary_factor", "rope_local_base_freq")


def read_json(path: Path, error: type[CheckpointError], limit: int = MAX_BYTES) -> dict[str, Any]:
    """The JSON object in ``path``; raises ``error`` for anything else, for NaN, and beyond size and depth limits."""
    size = path.stat().st_size
    if size > limit:
        raise error(f"{path} has {size} bytes; more than {limit} is not sensible for {path.name}")
    try:
        value = json.loads(path.read_bytes().decode("utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as cause:
        reason = "nested too deeply" if isinstance(cause, RecursionError) else str(cause)
        raise error(f"{path} is not valid JSON: {reason}; get the checkpoint again") from cause
    if not isinstance(value, dict):
        raise error(f"{path} holds a JSON {type(value).__name__}, expected an object; get the checkpoint again")
    if _depth(value) > MAX_DEPTH:
        raise error(f"{path} is nested deeper than {MAX_DEPTH} levels; get the checkpoint again")
    return value


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number JSON allows")


def _depth(value: Any) -> int:
    deepest, stack = 0, [(value, 1)]
    while stack:
        node, level = stack.pop()
        deepest = max(deepest, level)
        children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
        stack.extend((child, level + 1) for child in children)
    return deepest


def load_config(folder: Path, name: str, trust: Trust) -> PretrainedConfig:
    """The checked transformers config of a checkpoint folder; ``name`` is what the user called the model."""
    if not (folder / CONFIG).exists() and not (folder / CONFIG).is_symlink():
        raise ModelNotFound(f"{name} has no {CONFIG}, so it is not a transformers checkpoint{_what_is_there(folder)}")
    raw = read_json(checked_file(folder, CONFIG, InvalidConfig), InvalidConfig)
    check_values(raw, name, trust)
    from transformers import AutoConfig

    try:
        with quiet():
            config: PretrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True, **trust.code_options())
    except Exception as cause:  # transformers raises whatever its config classes raise
        raise InvalidConfig(f"transformers refuses the {CONFIG} of {name}: {first_line(cause)}") from cause
    _settle(config, name)
    declared_end_ids(folder, config, name)
    return config


def _settle(config: PretrainedConfig, name: str) -> None:
    """Undo what config files say about the machine of whoever wrote them, and what means "none" or "as usual"."""
    config._attn_implementation = None
    config._experts_implementation = None
    if (file := getattr(config, "transformers_weights", None)) not in (None, "model.safetensors", INDEX):
        raise InvalidConfig(
            f"{name}: {CONFIG} names {file!r} as its weights (transformers_weights); rename that file to "
            "model.safetensors and remove the setting"
        )
    text = config.get_text_config()
    if getattr(text, "sliding_window", None) == 0:
        if "sliding_attention" in (getattr(text, "layer_types", None) or ()):
            raise InvalidConfig(f"{name}: {CONFIG} has layers with sliding_attention and a sliding_window of 0")
        if not getattr(text, "layer_types", None):  # those that have kinds of layers do without
            text.sliding_window = None
    for settings in rope_sets(text):
        if settings.get("rope_type") == "mrope":  # its three positions are one in a text
            settings["rope_type"] = "default"


def positions_of(config: PretrainedConfig) -> int | None:
    """Longest text a model was made for, in tokens; None if its config does not say.

    YaRN stretches the original length by its factor; many configs leave max_position_embeddings as it was.
    """
    text = config.get_text_config()
    declared = next((int(value) for name in POSITIONS if (value := getattr(text, name, None))), None)
    stretched = [
        int(original * factor)
        for settings in rope_sets(text)
        if settings.get("rope_type") == "yarn"
        and (original := settings.get("original_max_position_embeddings"))
        and (factor := settings.get("factor"))
    ]
    return max([declared, *stretched]) if declared else max(stretched, default=None)


def _what_is_there(folder: Path) -> str:
    files = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if gguf := [file for file in files if file.endswith(".gguf")]:
        return f"; it holds GGUF files, pass one of them: {folder / gguf[0]}"
    return f"; it holds {', '.join(files[:5])}" if files else "; it is empty"


def check_values(raw: dict[str, Any], name: str, trust: Trust) -> None:
    """All checks on the parsed config; InvalidConfig, UntrustedCheckpoint or UnsupportedArchitecture."""
    _check_type(raw, name, trust)
    for place, section in _sections(raw):
        _check_dims(section, f"{name}: {CONFIG}{place}")
        _check_heads(section, f"{name}: {CONFIG}{place}")
        _check_rope(section, f"{name}: {CONFIG}{place}")
        _check_ids(section, f"{name}: {CONFIG}{place}")
    _check_tying(raw, name)


def _check_tying(raw: dict[str, Any], name: str) -> None:
    key = "tie_word_embeddings"
    sections = (raw, raw.get("text_config"))
    ties = [section[key] for section in sections if isinstance(section, dict) and key in section]
    if not all(isinstance(tie, bool) for tie in ties):
        raise InvalidConfig(f"{name}: {key} must be true or false in {CONFIG}")
    if len(set(ties)) > 1 and not any(raw.get(part) for part in MEDIA):  # with media, the outer one holds
        raise InvalidConfig(f"{name}: {CONFIG} says {key} true and false; make both places agree")


def _sections(raw: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    text = raw.get("text_config")
    if text is None:
        yield "", raw
    elif isinstance(text, dict):
        yield ".text_config", text
    else:
        raise InvalidConfig(f"text_config in {CONFIG} must be an object")


def _check_type(raw: dict[str, Any], name: str, trust: Trust) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    kind = raw.get("model_type")
    if not isinstance(kind, str) or not kind:
        raise InvalidConfig(f"{name}: {CONFIG} has no model_type, so its architecture is unknown; add it")
    if kind in CONFIG_MAPPING_NAMES:
        return
    modules = raw.get("auto_map")
    if not isinstance(modules, dict) or not modules:
        raise UnsupportedArchitecture(f"{name}: model_type {kind!r} is unknown to transformers; check its spelling")
    trust.require_for_code(name, kind, [str(module) for module in modules.values()])


def _check_dims(section: dict[str, Any], where: str) -> None:
    for key in (*_NEVER_NULL, *_NULLABLE):
        if key not in section or (section[key] is None and key in _NULLABLE):
            continue
        value = section[key]
        for each in value if key in _PER_LAYER and isinstance(value, list) else [value]:
            _check_dim(key, each, where)
    for key in (*_POSITIVE_FLOATS, *_FINITE_FLOATS):
        value = section.get(key)
        if value is not None and not _finite(value):
            raise InvalidConfig(f"{where}: {key} must be a finite number, it is {value!r}")
        if value is not None and key in _POSITIVE_FLOATS and value <= 0:
            raise InvalidConfig(f"{where}: {key} must be positive, it is {value!r}")


def _check_dim(key: str, value: Any, where: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidConfig(f"{where}: {key} must be a whole number, it is {value!r}")
    limit = MAX_LAYERS if key in _LAYERS else MAX_DIM
    least = 0 if key in _MAY_BE_ZERO else 1
    if not least <= value <= limit:
        raise InvalidConfig(f"{where}: {key} must lie between {least} and {limit}, it is {value}")


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _first(section: dict[str, Any], names: tuple[str, ...]) -> Any:
    return next((section[name] for name in names if section.get(name) is not None), None)


def _check_heads(section: dict[str, Any], where: str) -> None:
    heads, width, kv = _first(section, _HEADS), _first(section, _WIDTH), section.get("num_key_value_heads")
    if heads and kv and heads % kv:
        raise InvalidConfig(f"{where}: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv}")
    latent = section.get("kv_lora_rank") is not None
    if heads and width and section.get("head_dim") is None and not latent and width % heads:
        raise InvalidConfig(
            f"{where}: hidden size {width} is not a multiple of {heads} heads, and there is no head_dim"
        )
    kinds = section.get("layer_types")
    layers = _first(section, _LAYERS)
    if kinds is not None and (not isinstance(kinds, list) or (layers and len(kinds) != layers)):
        count = len(kinds) if isinstance(kinds, list) else repr(kinds)
        raise InvalidConfig(f"{where}: layer_types has {count} entries for {layers} layers")


def _check_rope(section: dict[str, Any], where: str) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    known = {"default", *ROPE_INIT_FUNCTIONS}
    for key in ("rope_scaling", "rope_parameters"):
        settings = section.get(key)
        if settings is None:
            continue
        if not isinstance(settings, dict):
            raise InvalidConfig(f"{where}: {key} must be an object, it is {settings!r}")
        nested = [value for value in settings.values() if isinstance(value, dict)]
        for entry in nested or [settings]:
            _check_rope_entry(entry, known, f"{where}: {key}")


def _check_rope_entry(entry: dict[str, Any], known: set[str], where: str) -> None:
    kind = entry.get("rope_type", entry.get("type", "default"))
    aliases = {"su": "longrope", "mrope": "default"}
    if not isinstance(kind, str) or aliases.get(kind, kind) not in known:
        raise InvalidConfig(f"{where} has the unknown type {kind!r}; known are {', '.join(sorted(known))}")
    for key, value in entry.items():
        if key in ("rope_type", "type") or value is None or isinstance(value, bool):
            continue
        numbers = value if isinstance(value, list) else [value]
        if not all(_finite(number) for number in numbers):
            raise InvalidConfig(f"{where}.{key} must be finite numbers, it is {value!r}")
        if key in ("factor", "rope_theta", "original_max_position_embeddings") and any(n <= 0 for n in numbers):
            raise InvalidConfig(f"{where}.{key} must be positive, it is {value!r}")


def _check_ids(section: dict[str, Any], where: str) -> None:
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        check_token_ids(section.get(key), key, section.get("vocab_size"), where, InvalidConfig)


def check_token_ids(value: Any, key: str, vocab: int | None, where: str, error: type[CheckpointError]) -> list[int]:
    """``value`` (None, an id or a list of ids) as a list; raises ``error`` unless every id is below ``vocab``.

    -1 counts as "none", as older configs write it.
    """
    ids = value if isinstance(value, list) else [value] if value is not None and value != -1 else []
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int) or token < 0 or (vocab and token >= vocab):
            raise error(f"{where}: {key} {token!r} is not an id of a vocabulary of {vocab}")
    return ids


def declared_end_ids(folder: Path, config: PretrainedConfig, name: str) -> list[int]:
    """End ids of generation_config.json and of the config, in that order; InvalidConfig if one is out of range."""
    text = config.get_text_config()
    generation: dict[str, Any] = {}
    if (folder / GENERATION).exists() or (folder / GENERATION).is_symlink():
        generation = read_json(checked_file(folder, GENERATION, InvalidConfig), InvalidConfig)
    ids = []
    for value, where in ((generation.get("eos_token_id"), GENERATION), (text.eos_token_id, CONFIG)):
        ids += check_token_ids(value, "eos_token_id", text.vocab_size, f"{name}: {where}", InvalidConfig)
    return ids
