"""Reads a draft's config.json strictly: every field has a type and a meaning here, or is refused.

All problems of a file are collected and raised together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from dspark_runtime.errors import InvalidConfig

MAX_DIM = 2**31 - 1

NO_EFFECT = frozenset(
    {
        # transformers' bookkeeping and generation settings, which no draft's forward pass reads
        *("transformers_version", "architectures", "model_type", "auto_map", "_name_or_path", "name_or_path"),
        *("dtype", "torch_dtype", "torchscript", "return_dict", "use_cache", "use_bfloat16", "problem_type"),
        *("output_attentions", "output_hidden_states", "chunk_size_feed_forward", "pruned_heads", "finetuning_task"),
        *(
            "is_encoder_decoder",
            "is_decoder",
            "add_cross_attention",
            "cross_attention_hidden_size",
            "task_specific_params",
        ),
        *("id2label", "label2id", "tokenizer_class", "prefix", "tie_encoder_decoder", "tf_legacy_loss"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id"),
        *(
            "max_length",
            "min_length",
            "do_sample",
            "early_stopping",
            "num_beams",
            "num_beam_groups",
            "diversity_penalty",
        ),
        *("temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size"),
        *(
            "encoder_no_repeat_ngram_size",
            "bad_words_ids",
            "num_return_sequences",
            "output_scores",
            "forced_bos_token_id",
        ),
        *(
            "forced_eos_token_id",
            "return_dict_in_generate",
            "remove_invalid_values",
            "exponential_decay_length_penalty",
        ),
        *("suppress_tokens", "begin_suppress_tokens"),
        *("_attn_implementation", "_attn_implementation_autoset", "attn_implementation", "_experts_implementation"),
        # training only
        *("initializer_range", "attention_dropout", "pretraining_tp"),
    }
)


class Fields:
    """One JSON object of a config. Readers note what is wrong and return something usable; :meth:`finish` raises."""

    def __init__(self, raw: Mapping[str, Any], where: str, problems: list[str] | None = None, prefix: str = "") -> None:
        self._raw, self._where, self._prefix = raw, where, prefix
        self._problems: list[str] = [] if problems is None else problems
        self._seen: set[str] = set()
        self._inner: list[Fields] = []

    def has(self, key: str) -> bool:
        """Whether the field is there and not null; counts as read."""
        self._seen.add(key)
        return self._raw.get(key) is not None

    def problem(self, text: str) -> None:
        """Note something wrong with the file."""
        self._problems.append(text)

    def _read(self, key: str, default: Any) -> Any:
        self._seen.add(key)
        if self._raw.get(key) is not None:
            return self._raw[key]
        if default is ...:
            self.problem(f"{self._prefix}{key} is missing")
        return default

    def whole(self, key: str, low: int = 1, high: int = MAX_DIM, default: Any = ...) -> int:
        """A whole number within limits."""
        value = self._read(key, default)
        if value is ...:
            return max(low, 1)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            self.problem(f"{self._prefix}{key} must be a whole number from {low} to {high}, it is {value!r}")
            return max(low, 1)
        return value

    def number(self, key: str, default: Any = ...) -> float:
        """A positive finite number."""
        value = self._read(key, default)
        if value is ...:
            return 1.0
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
            self.problem(f"{self._prefix}{key} must be a positive number, it is {value!r}")
            return 1.0
        return float(value)

    def flag(self, key: str, default: Any = ...) -> bool:
        """true or false."""
        value = self._read(key, default)
        if not isinstance(value, bool):
            if value is not ...:
                self.problem(f"{self._prefix}{key} must be true or false, it is {value!r}")
            return False
        return value

    def choice(self, key: str, choices: Sequence[str], default: Any = ...) -> str:
        """One of ``choices``."""
        value = self._read(key, default)
        if value not in choices:
            if value is not ...:
                self.problem(f"{self._prefix}{key} must be one of {', '.join(choices)}, it is {value!r}")
            return choices[0]
        return str(value)

    def ascending(self, key: str, low: int, default: Any = ...) -> tuple[int, ...] | None:
        """A list of distinct ascending whole numbers from ``low``; None if it is not there and may be missing."""
        value = self._read(key, default)
        if value is ... or value is None:
            return None
        whole = isinstance(value, list) and all(isinstance(v, int) and not isinstance(v, bool) for v in value)
        if not whole or not value or value != sorted(set(value)) or value[0] < low:
            self.problem(f"{self._prefix}{key} must be ascending layer numbers from {low}, each once; it is {value!r}")
            return None
        return tuple(value)

    def names(self, key: str, count: int, choices: Sequence[str]) -> list[str] | None:
        """A list of ``count`` strings out of ``choices``; None if it is not there."""
        value = self._read(key, None)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != count or not all(v in choices for v in value):
            self.problem(f"{self._prefix}{key} must be {count} of {', '.join(choices)}, it is {value!r}")
            return None
        return value

    def inner(self, key: str, default: Any = ...) -> Fields:
        """A JSON object inside this one; an empty one if it is missing."""
        value = self._read(key, default)
        if value is not ... and not isinstance(value, Mapping):
            self.problem(f"{self._prefix}{key} must be an object, it is {value!r}")
        made = Fields(value if isinstance(value, Mapping) else {}, self._where, self._problems, f"{self._prefix}{key}.")
        if isinstance(value, Mapping):
            self._inner.append(made)
        return made

    def view(self, values: Mapping[str, Any], prefix: str) -> Fields:
        """Fields of this file that were gathered from several places; its unknown ones are not looked for."""
        return Fields(values, self._where, self._problems, prefix)

    def raw(self, key: str) -> Any:
        """The raw field, None if it is absent; counts as read."""
        self._seen.add(key)
        return self._raw.get(key)

    def without_effect(self, *keys: str) -> None:
        """Fields that may be there and change nothing here."""
        self._seen.update(keys)

    def neutral(self, key: str, *allowed: Any) -> None:
        """A field that may only have one of ``allowed`` (or be missing or null): anything else is not computed here."""
        self._seen.add(key)
        value = self._raw.get(key)
        if value is not None and not any(
            value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed
        ):
            kept = " or ".join(map(repr, allowed)) if allowed else "missing"
            self.problem(f"{self._prefix}{key} {value!r} is not supported, it has to be {kept}")

    def finish(self) -> None:
        """Raise InvalidConfig with all problems, including fields that nothing read."""
        self._unknown()
        if self._problems:
            raise InvalidConfig(f"{self._where}: " + "; ".join(self._problems))

    def _unknown(self) -> None:
        for inner in self._inner:
            inner._unknown()
        unknown = sorted({key for key, value in self._raw.items() if value is not None} - self._seen - NO_EFFECT)
        if unknown:
            names = ", ".join(f"{self._prefix}{key}" for key in unknown)
            self.problem(f"unknown fields {names} (remove what the draft does not need, or use a draft without them)")
