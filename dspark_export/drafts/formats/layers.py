"""Geometry of a draft's decoder layers from its config, for all formats."""

from __future__ import annotations

from typing import Any

from dspark_export.drafts.formats.draft import ACTIVATIONS, DraftLayers, Family, Rope
from dspark_export.drafts.formats.fields import Fields

FULL, SLIDING = "full_attention", "sliding_attention"
_ROPE_FIELDS: dict[str, dict[str, type]] = {
    "default": {},
    "linear": {"factor": float},
    "llama3": {
        "factor": float,
        "low_freq_factor": float,
        "high_freq_factor": float,
        "original_max_position_embeddings": int,
    },
    "yarn": {
        "factor": float,
        "original_max_position_embeddings": int,
        "attention_factor": float,
        "beta_fast": float,
        "beta_slow": float,
        "mscale": float,
        "mscale_all_dim": float,
        "truncate": bool,
    },
    "proportional": {"factor": float},
}
_ROPE_NEEDS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor",),
}
OLD_THETA = 10000.0
"""What transformers takes where a config has no ``rope_theta``; drafts of EAGLE's authors rely on it."""


def read_layers(fields: Fields, family: Family, *, windows: bool = False, old_theta: bool = False) -> DraftLayers:
    """The layers that ``fields`` describe.

    ``windows``: sliding layers are possible in this format. ``old_theta``: a missing ``rope_theta`` means 10000.
    """
    count = fields.whole("num_hidden_layers", high=4096)
    hidden = fields.whole("hidden_size")
    heads = fields.whole("num_attention_heads")
    gemma = family == "gemma4"
    k_eq_v = gemma and fields.flag("attention_k_eq_v")
    kv_heads, head_dim = _gemma_heads(fields, k_eq_v) if gemma else _heads(fields, hidden, heads)
    if heads % kv_heads:
        fields.problem(f"{heads} attention heads are not a multiple of {kv_heads} key/value heads")
    if head_dim % 2:
        fields.problem(f"heads of width {head_dim} cannot be rotated in pairs")
    layers = DraftLayers(
        family=family,
        count=count,
        hidden_size=hidden,
        intermediate_size=fields.whole("intermediate_size"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        norm_epsilon=fields.number("rms_norm_eps"),
        activation=_activation(fields, "hidden_activation" if gemma else "hidden_act"),
        attention_bias=fields.flag("attention_bias", False),
        rope=_rope(fields, family, old_theta),
        windows=_windows(fields, count, windows),
        max_positions=fields.whole("max_position_embeddings"),
        k_eq_v=k_eq_v,
        scale=1.0 if gemma else float(head_dim) ** -0.5,
        softcap=fields.number("final_logit_softcapping") if gemma and fields.has("final_logit_softcapping") else None,
    )
    _refuse_what_is_not_computed(fields, gemma)
    return layers


def _heads(fields: Fields, hidden: int, heads: int) -> tuple[int, int]:
    kv_heads = fields.whole("num_key_value_heads", default=heads)
    if fields.has("head_dim"):
        return kv_heads, fields.whole("head_dim")
    if hidden % heads:
        fields.problem(f"head_dim is missing, and hidden_size {hidden} is not a multiple of {heads} heads")
    return kv_heads, max(hidden // heads, 2)


def _gemma_heads(fields: Fields, k_eq_v: bool) -> tuple[int, int]:
    """Drafts for Gemma 4 take the geometry of its global layers."""
    fields.without_effect("head_dim")
    name = "num_global_key_value_heads" if k_eq_v else "num_key_value_heads"
    fields.without_effect("num_global_key_value_heads", "num_key_value_heads")
    by_layer = fields.raw("per_layer_config")
    if fields.has("global_head_dim") or not isinstance(by_layer, dict) or not by_layer:
        return fields.whole(name), fields.whole("global_head_dim")
    entries = [entry if isinstance(entry, dict) else {} for entry in by_layer.values()]  # as transformers 5 saves it
    if any(entry != entries[0] for entry in entries) or not isinstance(entries[0].get("head_dim"), int):
        fields.problem("global_head_dim is missing, and per_layer_config does not give one for all layers")
        return 1, 2
    kv_heads = entries[0].get("num_key_value_heads")
    return kv_heads if isinstance(kv_heads, int) else fields.whole("num_key_value_heads"), entries[0]["head_dim"]


def _activation(fields: Fields, key: str) -> str:
    name = fields.raw(key)
    if name is None:
        fields.problem(f"{key} is missing")
        return "silu"
    if not isinstance(name, str) or name not in ACTIVATIONS:
        fields.problem(f"activation {name!r} of the draft is unknown; known are {', '.join(ACTIVATIONS)}")
    return name if isinstance(name, str) else "silu"


def _windows(fields: Fields, count: int, possible: bool) -> tuple[int | None, ...]:
    kinds = fields.names("layer_types", count, (FULL, SLIDING))
    fields.without_effect("max_window_layers")
    slides = fields.raw("use_sliding_window")
    if slides is True and kinds is None:
        fields.problem("use_sliding_window is true, and layer_types does not say for which layers")
    width = fields.raw("sliding_window")
    if kinds is None or SLIDING not in kinds:
        return (None,) * count
    if not possible:
        fields.problem("layer_types has sliding_attention layers, which drafts of this format do not have")
        return (None,) * count
    window = fields.whole("sliding_window") if width is not None else None
    if window is None:
        fields.problem("sliding_window is missing, and layer_types has sliding_attention layers")
    return tuple(window if kind == SLIDING else None for kind in kinds)


def _rope(fields: Fields, family: Family, old_theta: bool) -> Rope:
    """Rotary settings: ``rope_parameters``, or ``rope_theta`` and ``rope_scaling`` of older configs."""
    fields.neutral("partial_rotary_factor", 1, 1.0)
    theta = fields.number("rope_theta") if fields.has("rope_theta") else None
    scaling = fields.raw("rope_scaling")
    settings: Any = fields.raw("rope_parameters")
    place = "rope_parameters"
    if isinstance(settings, dict) and any(isinstance(value, dict) for value in settings.values()):
        place, settings = f"rope_parameters.{FULL}", settings.get(FULL)
    if settings is None and scaling is not None:
        place, settings = "rope_scaling", scaling
    elif settings is not None and scaling is not None and scaling != settings:
        fields.problem("rope_parameters and rope_scaling say different things; keep one")
    if settings is not None and not isinstance(settings, dict):
        fields.problem(f"{place} must be an object, it is {settings!r}")
        settings = None
    given = dict(settings or {})
    return _rope_of(fields, given, place, theta, family, old_theta)


def _rope_of(
    fields: Fields, given: dict[str, Any], place: str, theta: float | None, family: Family, old_theta: bool
) -> Rope:
    old_name = given.pop("type", None)
    kind = given.setdefault("rope_type", "default" if old_name is None else old_name)
    known = [name for name in _ROPE_FIELDS if name != "proportional" or family == "gemma4"]
    if kind not in known:
        fields.problem(f"{place}.rope_type {kind!r} is not supported; {', '.join(known)} are")
        return Rope(theta or OLD_THETA)
    own = given.get("rope_theta")
    if own is not None and theta is not None and own != theta:
        fields.problem(f"rope_theta is {theta} and {own} in {place}; make both agree")
    theta = own if own is not None else theta
    if theta is None and old_theta:
        theta = OLD_THETA
    allowed = {"rope_theta": float, **_ROPE_FIELDS[kind]}
    partial = given.get("partial_rotary_factor", 1.0)
    if kind == "proportional":
        allowed["partial_rotary_factor"] = float
        if isinstance(partial, bool) or not isinstance(partial, int | float) or not 0 < partial <= 1:
            fields.problem(f"{place}.partial_rotary_factor must lie in (0, 1], it is {partial!r}")
            partial = 1.0
    elif partial not in (1, 1.0) or isinstance(partial, bool):
        fields.problem(f"{place}.partial_rotary_factor {partial!r} is supported for rope_type proportional only")
    for key, value in given.items():
        if key not in allowed and key not in ("rope_type", "partial_rotary_factor"):
            fields.problem(f"{place}.{key} means nothing for rope_type {kind}")
        elif key in allowed and not _fits(value, allowed[key]):
            fields.problem(f"{place}.{key} must be a positive number, it is {value!r}")
    missing = [f"{place}.{key}" for key in _ROPE_NEEDS.get(kind, ()) if given.get(key) is None]
    if missing:
        fields.problem(f"{', '.join(missing)} missing")
    if theta is None:
        fields.problem("rope_theta is missing")
    good = float(theta) if theta is not None and _fits(theta, float) else OLD_THETA
    return Rope(good, float(partial) if kind == "proportional" else 1.0, {**given, "rope_theta": good})


def _fits(value: Any, kind: type) -> bool:
    if kind is bool:
        return isinstance(value, bool)
    numbers = int if kind is int else int | float
    return isinstance(value, numbers) and not isinstance(value, bool) and 0 < value < float("inf")


def _refuse_what_is_not_computed(fields: Fields, gemma: bool) -> None:
    fields.neutral("mlp_bias", False)
    fields.neutral("quantization_config")
    fields.neutral("attn_logit_softcapping")
    fields.neutral("query_pre_attn_scalar")
    fields.neutral("logit_scale", 1, 1.0)
    if gemma:
        fields.neutral("enable_moe_block", False)
        fields.neutral("hidden_size_per_layer_input", 0)
        fields.without_effect("num_kv_shared_layers", "use_double_wide_mlp")  # of the target: shapes would show it
        fields.without_effect("vocab_size_per_layer_input", "use_bidirectional_attention")
        fields.without_effect("num_experts", "top_k_experts", "moe_intermediate_size", "per_layer_config")
        fields.without_effect("target_model_type", "target_text_model_type")
    else:
        fields.neutral("final_logit_softcapping")
