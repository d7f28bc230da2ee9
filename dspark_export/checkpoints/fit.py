"""Matches what a checkpoint stores with the model its config describes: names and shapes, no payload is read.

transformers loads what it knows, drops what it does not, and starts what is missing from random numbers. Here every
stored tensor becomes part of the model, is unread for a known reason, or is an error, and nothing starts at random.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dspark_export.checkpoints.inventory import ABSENT, Inventory, harmless_tensors, some
from dspark_export.checkpoints.library_calls import first_line, quiet
from dspark_export.checkpoints.trust import Trust
from dspark_runtime.errors import InvalidWeights

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

Shapes = Mapping[str, tuple[int, ...]]
_LAYER = re.compile(r"(?:layers|blocks|h)\.(\d+)\.")
_ADAPTER = (".lora_A.", ".lora_B.", ".base_layer.", ".modules_to_save.")


@dataclass(frozen=True)
class Fit:
    """``taken``: the stored tensors that the model is made of; ``unread``: what rightly stays unused, and why."""

    taken: tuple[str, ...]
    unread: Mapping[str, str]


def fit(
    stored: Shapes, config: PretrainedConfig, name: str, trust: Trust, is_zero: Callable[[str], bool] = lambda _: False
) -> Fit:
    """Let transformers map ``stored`` to a model on the meta device.

    ``is_zero``: whether a tensor holds nothing but zeros; asked of biases that the model does not have, which AutoGPTQ
    stores for every layer.

    Raises InvalidWeights for shapes that differ, weights the model lacks, and tensors that nothing would use.
    """
    import torch

    if adapter := [tensor for tensor in stored if any(part in tensor for part in _ADAPTER)]:
        raise InvalidWeights(
            f"{name} holds an adapter that is not merged ({some(adapter)}); merge it into its model (peft's "
            "merge_and_unload), save that, and build from there"
        )
    empty = {tensor: torch.empty(shape, device="meta") for tensor, shape in stored.items()}
    options = {"device_map": "meta", "ignore_mismatched_sizes": True, "dtype": torch.float32}
    model, report = load_from(empty, config, name, trust, **options)
    _explain_shapes(report, name)
    inventory = Inventory(stored)
    targets = targets_of(model, stored)
    _refuse_twins(targets, name)
    inventory.take(*targets)
    layers = config.get_text_config().num_hidden_layers
    for tensor, reason in harmless_tensors(stored, layers, config.model_type).items():
        if tensor not in targets:
            inventory.excuse(tensor, reason)
    for tensor in inventory.left:
        if tensor.endswith(".bias") and is_zero(tensor):
            inventory.excuse(tensor, "a bias of zeros, which adds nothing")
    explain_report(report, name, config.model_type, inventory.left)
    inventory.close(name, "tensors", _advice(inventory.left, config))
    return Fit(tuple(targets), inventory.unread)


def load_from(
    weights: Mapping[str, Any], config: PretrainedConfig, name: str, trust: Trust, **options: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A model of ``weights``, and transformers' whole report of what it did with them; InvalidWeights if it fails."""
    try:
        with quiet(), _reporting_everything():
            kind = causal_class(config, trust)
            loaded: tuple[PreTrainedModel, dict[str, Any]] = kind.from_pretrained(
                None, config=config, state_dict=dict(weights), output_loading_info=True, **options
            )
    except (MemoryError, KeyboardInterrupt, InvalidWeights):
        raise
    except Exception as cause:  # transformers raises anything here
        raise InvalidWeights(f"{name}: its weights cannot be loaded: {first_line(cause)}") from cause
    return loaded


def causal_class(config: PretrainedConfig, trust: Trust) -> type[PreTrainedModel]:
    """The class of the language model that ``config`` describes."""
    import torch
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if isinstance(kind, type):
        return kind
    with torch.device("meta"):  # several classes, or one that comes with the checkpoint
        return type(AutoModelForCausalLM.from_config(config, **trust.code_options()))


@contextmanager
def _reporting_everything() -> Iterator[None]:
    """Model classes have patterns of names that transformers leaves out of its report; none is left out here."""
    from transformers import PreTrainedModel

    filtering = PreTrainedModel._adjust_missing_and_unexpected_keys
    PreTrainedModel._adjust_missing_and_unexpected_keys = lambda self, report: None
    try:
        yield
    finally:
        PreTrainedModel._adjust_missing_and_unexpected_keys = filtering


def targets_of(model: PreTrainedModel, stored: Iterable[str]) -> dict[str, tuple[str, str | None]]:
    """By stored tensor the weight it becomes, as transformers renames it, and the pattern of a conversion of several
    tensors; without those that become nothing."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    weights = model.state_dict()
    rules = get_model_conversion_mapping(model) or []
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    found = {}
    for tensor in stored:
        target, pattern = rename_source_key(tensor, renamings, converters, model.base_model_prefix, weights)
        if target not in weights and tensor in weights:
            target, pattern = tensor, None
        if target in weights:
            found[tensor] = (target, pattern)
    return found


def _refuse_twins(targets: Mapping[str, tuple[str, str | None]], name: str) -> None:
    first: dict[str, str] = {}
    for tensor, (target, pattern) in targets.items():
        if pattern is None and first.setdefault(target, tensor) != tensor:
            raise InvalidWeights(f"{name} stores {target!r} twice, as {first[target]!r} and as {tensor!r}; remove one")


def _explain_shapes(report: Mapping[str, Any], name: str) -> None:
    if mismatched := sorted(report["mismatched_keys"], key=str):
        key, stored, wanted = (*mismatched[0], None, None)[:3]
        shapes = f" (stored {list(stored)}, config {list(wanted)})" if stored and wanted else ""
        raise InvalidWeights(
            f"{name}: {key!r} has another shape than the config asks for{shapes}; they do not belong together"
        )


def explain_report(report: Mapping[str, Any], name: str, kind: str, left: Iterable[str] = ()) -> None:
    """InvalidWeights for what transformers could not load into a model of type ``kind``; ``left``: tensors that nothing
    would use."""
    _explain_shapes(report, name)
    if missing := sorted(key for key in report["missing_keys"] if not key.endswith(ABSENT.get(kind, ("\0",)))):
        tied = "; or is tie_word_embeddings missing in the config?" if any("lm_head" in key for key in missing) else ""
        unused = f"; it holds {some(left)} instead, which nothing would use" if list(left) else ""
        raise InvalidWeights(
            f"{name} lacks {len(missing)} weights the config asks for, e.g. {some(missing)}{unused}{tied}"
        )
    if errors := report["error_msgs"]:
        raise InvalidWeights(f"{name}: its weights do not fit its config: {' '.join(str(errors[0]).split())[:300]}")


def _advice(left: list[str], config: PretrainedConfig) -> str:
    """What to do about tensors that nothing would use."""
    layers = config.get_text_config().num_hidden_layers
    if any(int(match[1]) >= layers for tensor in left if (match := _LAYER.search(tensor))):
        return f"the config has {layers} layers: correct num_hidden_layers, or remove the layers that do not belong"
    if all(tensor.endswith(".bias") for tensor in left):
        return "the config switches these biases off: correct it (attention_bias, mlp_bias, use_bias or the like)"
    return f"is {config.model_type} the right model_type? Correct the config, or remove what does not belong"
