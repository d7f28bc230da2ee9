"""``--self-draft auto``: finds by measuring which layers of a model draft best for it.

Candidates are prefixes (an early exit), gaps in the middle, and sets that leave out the least important layers.
Each is measured with :class:`DraftProbe`; the winner is the one with the highest predicted speed-up. It may well be
below 1: an untrained self-draft of a shallow model costs more than it gives, and ``pays`` says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from transformers import PreTrainedModel

from dspark_export.graphs.decoder import decoder_layers
from dspark_export.graphs.draft_probe import DraftProbe
from dspark_export.graphs.layer_choice import check_layers

MAX_DRAFT_TOKENS = 8
VERIFY_ROW_COST = 0.04
"""What one more row adds to a verify pass, in passes over one row: about what fp32 costs on two CPU cores."""

MAX_RELATIVE_COST = 0.8
"""Drafts that cost more than this are not candidates: even with perfect agreement they could hardly gain a sixth."""

_KEPT_IN_PREFIX = (0.4, 0.55, 0.7, 0.8, 0.9, 0.95)
_GAPS = (0.1, 0.17, 0.25, 0.33)
_SKIPPED_BY_RANK = (0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5)


@dataclass(frozen=True)
class Effort:
    """How much is measured: texts, tokens of each, and layers that are tried alone."""

    prompts: int
    tokens: int
    single_layers: int

    @classmethod
    def for_model(cls, model: PreTrainedModel) -> Effort:
        """Less for larger models, so that choosing stays well below the time of an export."""
        parameters = sum(parameter.numel() for parameter in model.parameters())
        if parameters < 500_000_000:
            return cls(prompts=6, tokens=32, single_layers=28)
        if parameters < 3_000_000_000:
            return cls(prompts=4, tokens=16, single_layers=16)
        return cls(prompts=2, tokens=12, single_layers=8)


@dataclass(frozen=True)
class SelfDraftChoice:
    """A self-draft and what is expected of it.

    ``agreement``: share of positions with the target's most probable token. ``relative_cost``: a draft step in target
    steps, by weights read. ``draft_tokens``: the best number to draft, for which ``tokens_per_pass`` (the accepted
    length, bonus included) and ``speedup`` over plain decoding are predicted.
    """

    layers: tuple[int, ...]
    agreement: float
    relative_cost: float
    draft_tokens: int
    tokens_per_pass: float
    speedup: float

    @property
    def pays(self) -> bool:
        """Whether it is predicted to be faster than plain decoding at all."""
        return self.speedup > 1.0


def agreement(model: PreTrainedModel, tokenizer: Tokenizer, layers: Sequence[int]) -> float:
    """Share of positions, 0 to 1, where the model cut down to ``layers`` has the whole model's most probable token.

    Raises:
        UsageError: ``layers`` do not name layers of the model.
    """
    effort = Effort.for_model(model)
    probe = DraftProbe(model, tokenizer, prompts=effort.prompts, tokens=effort.tokens)
    return probe.agreement(check_layers(layers, probe.layers))


def choose(model: PreTrainedModel, tokenizer: Tokenizer, effort: Effort | None = None) -> SelfDraftChoice:
    """The self-draft of ``model`` with the highest predicted speed-up; see ``pays`` before relying on it.

    Raises:
        ExportError: the model has too few positions to measure on.
    """
    effort = effort or Effort.for_model(model)
    probe = DraftProbe(model, tokenizer, prompts=effort.prompts, tokens=effort.tokens)
    costs = LayerCosts.of(model)
    candidates = {*_prefixes(probe.layers), *_with_gaps(probe.layers), *_without_least(probe, effort.single_layers)}
    cheap = [layers for layers in candidates if costs.relative(layers) <= MAX_RELATIVE_COST]
    measured = sorted(cheap) or [min(candidates, key=costs.relative)]
    choices = [predict(layers, probe.agreement(layers), costs.relative(layers)) for layers in measured]
    return max(choices, key=lambda choice: (choice.speedup, -len(choice.layers)))


def predict(layers: tuple[int, ...], agreement: float, relative_cost: float) -> SelfDraftChoice:
    """What a self-draft gains if every drafted token is accepted with probability ``agreement``, independently.

    Accepted length and speed-up are those of Leviathan et al. 2023 (Fast Inference from Transformers via Speculative
    Decoding, section 3), with a verify pass that grows by VERIFY_ROW_COST a row.
    """

    def gain(drafted: int) -> tuple[float, float]:
        accepted = sum(agreement**n for n in range(drafted + 1))
        return accepted / (1 + VERIFY_ROW_COST * drafted + relative_cost * drafted), accepted

    best = max(range(1, MAX_DRAFT_TOKENS + 1), key=gain)
    speedup, tokens = gain(best)
    return SelfDraftChoice(layers, agreement, relative_cost, best, tokens, speedup)


@dataclass(frozen=True)
class LayerCosts:
    """Weights read in one decode step: by each layer, and by the head."""

    layers: tuple[int, ...]
    head: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> LayerCosts:
        def size(module: torch.nn.Module) -> int:
            return sum(parameter.numel() for parameter in module.parameters())

        return cls(tuple(size(layer) for layer in decoder_layers(model)), size(model.get_output_embeddings()))

    def relative(self, layers: Sequence[int]) -> float:
        """Cost of a step through ``layers`` and the head, in steps of the whole model."""
        return (sum(self.layers[n] for n in layers) + self.head) / (sum(self.layers) + self.head)


def _prefixes(count: int) -> Iterator[tuple[int, ...]]:
    for share in _KEPT_IN_PREFIX:
        yield tuple(range(min(count, max(1, round(share * count)))))


def _with_gaps(count: int) -> Iterator[tuple[int, ...]]:
    """One gap in the middle of the stack, and one in its upper half, where layers change the hidden state less."""
    for centre in (0.5, 0.62):
        for share in _GAPS:
            width = max(1, round(share * count))
            first = max(1, round(centre * count - width / 2))
            kept = tuple(n for n in range(count) if not first <= n < first + width)
            if kept:
                yield kept


def _without_least(probe: DraftProbe, tries: int) -> Iterator[tuple[int, ...]]:
    """Sets that leave out the layers whose absence alone costs least agreement (never the first or the last)."""
    inner = range(1, probe.layers - 1)
    tried = inner[:: max(1, -(-len(inner) // tries))] if inner else ()
    alone = {n: probe.agreement([m for m in range(probe.layers) if m != n]) for n in tried}
    ranked = sorted(alone, key=lambda n: (-alone[n], -n))
    for share in _SKIPPED_BY_RANK:
        skipped = set(ranked[: max(1, round(share * probe.layers))])
        if skipped:
            yield tuple(n for n in range(probe.layers) if n not in skipped)
