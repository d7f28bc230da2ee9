"""Decodes many prompts at once with PyTorch: in its batch, a finished sequence makes room for the next prompt.

On a CPU, generating a token in a large batch costs as much arithmetic as prefilling one, so a text is not read again
for its features: the layers' outputs are kept while it is generated.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from dspark_export.tracing.geometry import probe
from dspark_export.tracing.seams import CacheSeam, Pass, seamed
from dspark_export.train.features import Rows, Taps, likeliest
from dspark_runtime.speculation.kv_cache import round_up
from dspark_runtime.speculation.sampling import Sampler, SamplingParams, request_key


@dataclass(frozen=True)
class Question:
    """A prompt to continue: token ids, how to draw, and what tells equal prompts apart."""

    prompt: tuple[int, ...]
    params: SamplingParams = field(default_factory=SamplingParams)
    occurrence: int = 0


@dataclass(frozen=True)
class Answer:
    """What the target said, up to and with its end token; ``rows`` of prompt and response, None where none are kept."""

    question: Question
    tokens: tuple[int, ...]
    rows: Rows | None


@dataclass(frozen=True)
class DecodeOptions:
    """``slots``: sequences at once. ``taps``, ``top``: what is kept of every row, nothing without taps."""

    slots: int = 64
    max_new_tokens: int = 256
    ends: tuple[int, ...] = ()
    seed: int = 0
    taps: tuple[int, ...] = ()
    top: int = 64


@torch.inference_mode()
def decode(model: PreTrainedModel, questions: Iterable[Question], options: DecodeOptions) -> Iterator[Answer]:
    """Answers in the order in which they end. Except for rounding, a text does not depend on what it is decoded
    with."""
    with seamed(model):
        batch = _Batch(model, options)
        waiting = iter(questions)
        try:
            while True:
                while len(batch.running) < options.slots and (question := next(waiting, None)) is not None:
                    batch.begin(question)
                if not batch.running:
                    return
                yield from batch.step()
        finally:
            batch.taps.release()


class _Running:
    """One text. Its last token has not been through the target, unless it is ``complete``, when all have."""

    def __init__(self, question: Question, options: DecodeOptions) -> None:
        self.question = question
        self._options = options
        self._sampler = Sampler(question.params, options.seed, request_key(question.prompt, question.occurrence))
        self.tokens = list(question.prompt)
        self.ended = False
        self.features: list[Tensor] = []
        self.top_ids: list[Tensor] = []
        self.top_probs: list[Tensor] = []

    def draw(self, logits: Tensor, likeliest_token: int) -> None:
        """Append the token that follows, by the logits [vocab] of the last row."""
        greedy = self.question.params.greedy
        token = likeliest_token if greedy else self._sampler.draw(logits.cpu().numpy(), len(self.tokens))
        self.tokens.append(token)
        said = len(self.tokens) - len(self.question.prompt)
        self.ended = token in self._options.ends or said == self._options.max_new_tokens

    def answer(self) -> Answer:
        """The complete text."""
        count, rows = len(self.question.prompt), None
        if self.features:
            tops = (torch.stack(part) for part in (self.top_ids, self.top_probs))
            features = torch.cat([self.features[0], torch.stack(self.features[1:])])
            rows = Rows(features, *(functional.pad(part, (0, 0, count, 0)) for part in tops))
        return Answer(self.question, tuple(self.tokens[count:]), rows)


class _SlotCache(CacheSeam):
    """Keys and values [slots, heads, capacity, dim] of every layer, written in place. A pass concerns ``count``
    sequences from slot ``first``: either one row of each, or several of one that has none yet."""

    def __init__(self, memory: dict[int, tuple[Tensor, Tensor]], step: Pass, first: int, count: int) -> None:
        super().__init__(memory, step)
        self._slots = torch.arange(first, first + count, device=step.write_indices.device)

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        first, visible = int(self._slots[0]), self.step.attention_mask.shape[-1]
        seen = []
        for memory, new in zip(self.past[layer_idx], (key, value), strict=True):
            if new.shape[2] == 1:
                memory[self._slots, :, self.step.write_indices] = new[:, :, 0]
            else:
                memory[first, :, : new.shape[2]] = new[0]
            seen.append(memory[first : first + len(self._slots), :, :visible])
        return seen[0], seen[1]


class _Batch:
    """Running sequences; the one at place i has slot i of the cache."""

    def __init__(self, model: PreTrainedModel, options: DecodeOptions) -> None:
        self._model, self._options = model, options
        self._layers = probe(model.config)
        self._weight: Tensor = model.get_input_embeddings().weight
        self._device = self._weight.device
        self._memory: dict[int, tuple[Tensor, Tensor]] = {}
        self._capacity = 0
        self.running: list[_Running] = []
        self.taps = Taps(model, options.taps)

    def begin(self, question: Question) -> None:
        """Read a prompt and draw the first token."""
        count, slot = len(question.prompt), len(self.running)
        self._reserve(count + self._options.max_new_tokens)
        sequence = _Running(question, self._options)
        mask = torch.ones(1, 1, count, count, dtype=torch.bool, device=self._device).tril()
        positions = torch.arange(count, device=self._device)[None]
        logits = self._pass([sequence.tokens], positions, mask, slot)[0]
        if self._options.taps:
            sequence.features.append(self.taps.read()[0])
        sequence.draw(logits, int(logits.argmax()))
        self.running.append(sequence)

    def step(self) -> list[Answer]:
        """One pass over the last token of every sequence; the answers that are complete with it."""
        places = torch.tensor([len(s.tokens) - 1 for s in self.running], device=self._device)
        mask = torch.arange(int(places.max()) + 1, device=self._device) <= places[:, None]
        logits = self._pass([s.tokens[-1:] for s in self.running], places[:, None], mask[:, None, None], 0)
        if self._options.taps:
            features, (ids, probs) = self.taps.read()[:, 0], likeliest(logits, self._options.top)
            for row, sequence in enumerate(self.running):
                sequence.features.append(features[row])
                sequence.top_ids.append(ids[row])
                sequence.top_probs.append(probs[row])
        best = logits.argmax(-1).tolist()
        answers = []
        for slot in range(len(self.running) - 1, -1, -1):
            sequence = self.running[slot]
            if sequence.ended:
                answers.append(sequence.answer())
                self._retire(slot)
            else:
                sequence.draw(logits[slot], best[slot])
        return answers

    def _retire(self, slot: int) -> None:
        """The last sequence takes the slot."""
        last = len(self.running) - 1
        if slot < last:
            length = len(self.running[last].tokens)
            for parts in self._memory.values():
                for memory in parts:
                    memory[slot, :, :length] = memory[last, :, :length]
        self.running[slot] = self.running[last]
        self.running.pop()

    def _pass(self, ids: Sequence[Sequence[int]], positions: Tensor, mask: Tensor, first: int) -> Tensor:
        """Logits [batch, vocab] of the last row of each of these sequences."""
        step = Pass(mask, positions, positions[:, 0])
        cache = _SlotCache(self._memory, step, first, len(ids))
        given = torch.tensor([list(row) for row in ids], device=self._device)
        with step.active():
            out = self._model(
                input_ids=given, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1
            )
        logits: Tensor = out.logits[:, -1].float()
        return logits

    def _reserve(self, slots: int) -> None:
        if slots <= self._capacity:
            return
        capacity = round_up(max(slots, 2 * self._capacity))
        for number, layer in enumerate(self._layers):
            grown = []
            for part, width in enumerate((layer.key_dim, layer.value_dim)):
                memory = self._weight.new_zeros(self._options.slots, layer.kv_heads, capacity, width)
                if number in self._memory:
                    memory[:, :, : self._capacity] = self._memory[number][part]
                grown.append(memory)
            self._memory[number] = (grown[0], grown[1])
        self._capacity = capacity
