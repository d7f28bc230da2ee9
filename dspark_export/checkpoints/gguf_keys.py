"""Typed access to the settings of one architecture in a GGUF file, which remembers what was asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dspark_export.checkpoints.inventory import Inventory
from dspark_runtime.errors import InvalidConfig, UnsupportedArchitecture

_DESCRIPTIONS = {
    "rope.scaling.finetuned": "says how the model was trained",
    "tensor_data_layout": "says where the file came from",
    "attention.layer_norm_epsilon": "the norm of this architecture has another epsilon",
    "attention.layer_norm_rms_epsilon": "the norm of this architecture has another epsilon",
}
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "expert_count": (0,),
    "expert_used_count": (0,),
    "expert_shared_count": (0,),
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
    "expert_weights_scale": (0.0, 1.0),
    "expert_gating_func": (0,),
    "leading_dense_block_count": (0,),
    "nextn_predict_layers": (0,),
    "n_deepstack_layers": (0,),
    "attention.causal": (True,),
    "attention.sliding_window": (0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.clamp_kqv": (0.0,),
    "attention.scale": (0.0,),
    "attention.shared_kv_layers": (0,),
    "attention.temperature_scale": (0.0,),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "router_logit_softcapping": (0.0,),
    "logit_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "pooling_type": (0,),
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "rope.scaling.alpha": (0.0,),
}
_MEDIA = ("vision.", "mm.", "audio.")


class Keys:
    """The keys below ``architecture.`` of a file. Every read marks its key as used; :meth:`close` refuses the rest."""

    def __init__(self, path: Path, architecture: str, fields: Mapping[str, Any]) -> None:
        self.path, self.architecture = path, architecture
        prefix = f"{architecture}."
        self._values = {key.removeprefix(prefix): value for key, value in fields.items() if key.startswith(prefix)}
        self._inventory = Inventory(self._values)

    def get(self, key: str, default: Any = None) -> Any:
        """The value as it is stored, or ``default``."""
        self._inventory.take(key)
        return self._values.get(key, default)

    def count(self, key: str, default: int | None = None) -> int:
        """A positive whole number."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InvalidConfig(f"{self._name(key)} must be a positive whole number, it is {value!r}")
        return value

    def count_of_all_layers(self, key: str, default: int | None = None) -> int:
        """A positive whole number that may be stored once per layer, and must be the same for all of them."""
        value = self.get(key, default)
        if isinstance(value, list):
            if len(set(value)) != 1:
                raise UnsupportedArchitecture(
                    f"{self._name(key)} differs from layer to layer, which cannot be exported from a GGUF file; "
                    "use the model's safetensors checkpoint"
                )
            self._values[key] = value[0]
        return self.count(key, default)

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise InvalidConfig(f"{self._name(key)} must be a finite number, it is {value!r}")
        return float(value)

    def text(self, key: str, default: str) -> str:
        """A string."""
        value = self.get(key, default)
        if not isinstance(value, str):
            raise InvalidConfig(f"{self._name(key)} must be a string, it is {value!r}")
        return value

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def refuse(self, key: str, why: str) -> None:
        """UnsupportedArchitecture that names ``key``."""
        raise UnsupportedArchitecture(
            f"{self._name(key)} is {self._values[key]!r}: {why}; use the model's safetensors checkpoint"
        )

    def close(self) -> dict[str, str]:
        """What stayed unread and why; UnsupportedArchitecture for a setting that says something and was not read."""
        for key in self._inventory.left:
            value = self._values[key]
            if key in _DESCRIPTIONS:
                self._inventory.excuse(key, _DESCRIPTIONS[key])
            elif key.startswith(_MEDIA):
                self._inventory.excuse(key, "describes how images or sound are read; the bundle takes text only")
            elif value in _NEUTRAL.get(key, ()):
                self._inventory.excuse(key, "changes nothing at this value")
            else:
                self.refuse(key, "this setting changes the model's numbers and cannot be honoured")
        return {f"{self.architecture}.{key}": reason for key, reason in self._inventory.unread.items()}

    def _name(self, key: str) -> str:
        return f"{self.path}: {self.architecture}.{key}"
