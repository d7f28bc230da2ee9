"""The keywords of a call: their types, their defaults, and the settings that some of them are shorthand for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypedDict, TypeVar

from dspark_runtime.drafters.estimates import DraftSampling
from dspark_runtime.drafters.parts import DraftOptions
from dspark_runtime.errors import UsageError
from dspark_runtime.speculation.sampling import SamplingParams

Settings = TypeVar("Settings")


class CallOptions(TypedDict, total=False):
    """Keywords that :meth:`Bundle.generate` and :meth:`Bundle.chat` share, described at the former."""

    max_new_tokens: int | None
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    stop: str | Sequence[str] | None
    ignore_eos: bool
    draft_length: int | None
    draft_sampling: DraftSampling
    confidence_threshold: float
    draft_branches: int | None
    batch_size: int


class GenerateOptions(CallOptions, total=False):
    """Keywords of :meth:`Bundle.generate`, described there."""

    chat: bool
    template_variables: Mapping[str, object] | None


DEFAULTS: GenerateOptions = {
    "max_new_tokens": None,
    "seed": 0,
    "stop": (),
    "chat": False,
    "template_variables": None,
    "ignore_eos": False,
    "draft_length": None,
    "batch_size": 8,
}
"""Defaults of the keywords that are not shorthand; those have the defaults of the settings."""

SAMPLING_FIELDS = {name: name for name in ("temperature", "top_k", "top_p", "min_p")}
DRAFT_FIELDS = {"draft_sampling": "sampling", "confidence_threshold": "threshold", "draft_branches": "branches"}
"""Shorthand keywords, and the fields of the settings that they set."""


def sampling_params(
    params: SamplingParams | Sequence[SamplingParams] | None, options: CallOptions
) -> SamplingParams | Sequence[SamplingParams]:
    """``params``, or those that the shorthand keywords of ``options`` give; UsageError where both are given."""
    made = _from_shorthand(SamplingParams, "params", params is not None, options, SAMPLING_FIELDS)
    return made if params is None else params


def draft_options(drafting: DraftOptions | None, options: CallOptions) -> DraftOptions:
    """``drafting``, or those that the shorthand keywords of ``options`` give; UsageError where both are given."""
    if drafting is not None and not isinstance(drafting, DraftOptions):
        raise UsageError(f"drafting={drafting!r:.60}: give DraftOptions, or None for the defaults")
    made = _from_shorthand(DraftOptions, "drafting", drafting is not None, options, DRAFT_FIELDS)
    return made if drafting is None else drafting


def _from_shorthand(
    kind: Callable[..., Settings], name: str, given: bool, options: CallOptions, fields: Mapping[str, str]
) -> Settings:
    values = {field: options[option] for option, field in fields.items() if option in options}  # type: ignore[literal-required]
    if given and values:
        option = next(option for option in fields if option in options)
        raise UsageError(f"{option} was given beside {name}; set {fields[option]} in {name}, or leave {name} out")
    return kind(**values)
