"""The module that is traced for ``target`` and ``self_draft``: a model's own forward, called through the seams."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from dspark_export.tracing.seams import CacheSeam, Pass, pairs, seamed


def decoder_layers(model: PreTrainedModel) -> torch.nn.ModuleList:
    """The list of decoder layers, wherever the architecture keeps it."""
    wanted = model.config.get_text_config().num_hidden_layers
    return next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == wanted)


class SkippedLayer(torch.nn.Module):
    """Stands where a decoder layer was: passes the hidden state on. It has no weights and no cache."""

    def forward(self, hidden_states: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        return hidden_states


@contextmanager
def only_layers(model: PreTrainedModel, layers: Sequence[int]) -> Iterator[None]:
    """While active, ``model`` runs only ``layers``. They keep their numbers, weight names and cache slots."""
    stack = decoder_layers(model)
    originals = list(stack)
    for number in set(range(len(stack))) - set(layers):
        stack[number] = SkippedLayer()
    try:
        yield
    finally:
        for number, layer in enumerate(originals):
            stack[number] = layer


class Decoder(torch.nn.Module):
    """One pass of ``model`` with the contract's inputs and outputs as flat positional tensors.

    ``layers`` are those whose cache goes in and out; ``taps`` are layer numbers whose raw outputs are returned
    (-1: the embedding's), ascending.
    """

    def __init__(self, model: PreTrainedModel, layers: Sequence[int], taps: Sequence[int] = ()) -> None:
        super().__init__()
        self.model = model
        self.layers, self.taps = tuple(layers), tuple(taps)

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        input_ids, position_ids, attention_mask, write_indices, logit_rows, *past = inputs
        step = Pass(attention_mask, position_ids, write_indices)
        cache = CacheSeam(pairs(past, self.layers), step)
        tapped: dict[int, torch.Tensor] = {}
        hooks = [self._gather_before_head(logit_rows), *self._tap(tapped)]
        try:
            with step.active():
                out = self.model(input_ids=input_ids, position_ids=position_ids, past_key_values=cache, use_cache=True)
        finally:
            for hook in hooks:
                hook.remove()
        taps = (torch.cat([tapped[n] for n in self.taps], dim=-1),) if self.taps else ()
        present = [tensor for layer in self.layers for tensor in cache.present[layer]]
        return (out.logits.float(), *taps, *present)

    def _gather_before_head(self, rows: torch.Tensor) -> torch.utils.hooks.RemovableHandle:
        def gather(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
            (hidden,) = args
            index = rows.unsqueeze(-1).expand(-1, -1, hidden.shape[-1])
            return (torch.gather(hidden, 1, index),)

        return self.model.get_output_embeddings().register_forward_pre_hook(gather)

    def _tap(self, tapped: dict[int, torch.Tensor]) -> list[torch.utils.hooks.RemovableHandle]:
        stack = decoder_layers(self.model)
        hooks = []
        for number in self.taps:
            if number == -1:

                def entering(module: torch.nn.Module, args: tuple[torch.Tensor, ...], _n: int = number) -> None:
                    tapped[_n] = args[0]

                hooks.append(stack[0].register_forward_pre_hook(entering))
            else:

                def leaving(module: torch.nn.Module, args: object, output: torch.Tensor, _n: int = number) -> None:
                    tapped[_n] = output

                hooks.append(stack[number].register_forward_hook(leaving))
        return hooks


@contextmanager
def traceable(model: PreTrainedModel, layers: Sequence[int] | None = None) -> Iterator[None]:
    """``model`` with the seams in place and, when given, only ``layers`` left in it."""
    with seamed(model):
        if layers is None:
            yield
        else:
            with only_layers(model, layers):
                yield


def vocab_size(model: PreTrainedModel) -> int:
    """Rows of the output head, which may exceed the tokenizer's vocabulary."""
    return int(model.get_output_embeddings().weight.shape[0])


def dtype_name(model: PreTrainedModel) -> str:
    """The model's dtype in the contract's spelling: ``float32``, ``float16`` or ``bfloat16``."""
    return str(model.dtype).removeprefix("torch.")
