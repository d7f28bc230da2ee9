"""How often a self-draft's next token is the target's, measured in PyTorch on texts the target wrote itself.

A draft pass reads the keys and values the *target* left for the committed text and adds only its own row. The probe
does just that for all positions of a text at once: every position is a separate row after the target's cache, and
the mask shows it the target's slots before it and its own slot, as if all rows were branches of one tree.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from tokenizers import Tokenizer
from transformers import DynamicCache, PreTrainedModel

from dspark_export.checkpoints.config import positions_of
from dspark_export.graphs.decoder import decoder_layers
from dspark_export.tracing.geometry import probe
from dspark_export.tracing.seams import CacheSeam, Pass, seamed
from dspark_runtime.bundle.contract import CacheLayer
from dspark_runtime.errors import ExportError

PROMPTS = (
    "The history of the bicycle begins in the early nineteenth century, when a German baron built",
    'def fibonacci(n):\n    """Return the first n Fibonacci numbers as a list."""\n    numbers =',
    "Question: A train travels 60 miles in one and a half hours. How fast does it go?\nAnswer: First we",
    "Dear Ms. Walker,\n\nthank you for your letter of last Tuesday. I am glad to tell you that we have",
    "Once upon a time, in a village at the edge of a large forest, there lived an old woman who",
    "To make a simple tomato soup you need the following: four ripe tomatoes, one onion, a little",
)
_LONGEST_PROMPT = 24


class DraftProbe:
    """Measures self-drafts of ``model`` on ``prompts`` texts, each continued greedily for ``tokens`` tokens.

    ``hidden``: what goes into each layer of the target, and out of the last, [texts, positions, hidden] each.
    ``wanted``: its most probable tokens, int64 [texts, positions].
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Tokenizer, *, prompts: int, tokens: int) -> None:
        self.model, self.layers = model, len(decoder_layers(model))
        ids = _continue(model, _prompt_ids(tokenizer, prompts, tokens, model), tokens)
        self._ids, self._first = ids, ids.shape[1] - tokens - 1
        self._run_target()

    def agreement(self, layers: Sequence[int]) -> float:
        """Share of positions, 0 to 1, where the model cut down to ``layers`` has the target's most probable token."""
        return float(self.agrees(layers).float().mean())

    def agrees(self, layers: Sequence[int]) -> torch.Tensor:
        """bool [texts, positions]: where the model cut down to ``layers`` has the target's most probable token."""
        kept = set(layers)
        # Up to the first layer left out, draft and target are the same: start there, from what the target had.
        start = next((n for n in range(self.layers) if n not in kept), self.layers)
        return self._draft(self.hidden[start], sorted(n for n in kept if n >= start)) == self.wanted

    def layer(self, number: int, hidden: torch.Tensor) -> torch.Tensor:
        """Output [texts, positions, hidden] of one layer, of rows ``hidden`` that see the target's keys before them."""
        found: list[torch.Tensor] = []
        stack = decoder_layers(self.model)
        hook = stack[number].register_forward_hook(
            lambda module, args, output: found.append(output if isinstance(output, torch.Tensor) else output[0])
        )
        try:
            self._draft(hidden, [number], logits=1)
        finally:
            hook.remove()
        return found[0]

    def tokens(self, hidden: torch.Tensor) -> torch.Tensor:
        """int64 [texts, positions]: the most probable token after the last layer's output ``hidden``."""
        return self._draft(hidden, ())

    @torch.no_grad()
    def _draft(self, hidden: torch.Tensor, layers: Sequence[int], logits: int | None = None) -> torch.Tensor:
        """The most probable tokens after ``layers``, which begin with ``hidden``; of the first ``logits`` rows only."""
        ids, batch = self._ids[:, self._first : -1], self._ids.shape[0]
        rows, length = ids.shape[1], self._length
        positions = torch.arange(self._first, self._first + rows).expand(batch, -1)
        before = torch.arange(length) < positions[0].unsqueeze(1)
        mask = torch.cat((before, torch.eye(rows, dtype=torch.bool)), dim=1).expand(batch, 1, -1, -1)
        step = Pass(mask, positions, torch.full((batch,), length))
        with running(self.model, layers), self._entering(hidden):
            return self._pass(step, CacheSeam(self._cache, step), ids, last=logits).argmax(-1)

    @torch.no_grad()
    def _run_target(self) -> None:
        batch, tokens = self._ids.shape
        self._length = tokens - 1
        rows = tokens - 1 - self._first

        def memory(layer: CacheLayer, dim: int) -> torch.Tensor:
            return torch.zeros(batch, layer.kv_heads, self._length + rows, dim, dtype=self.model.dtype)

        empty = {
            n: (memory(layer, layer.key_dim), memory(layer, layer.value_dim))
            for n, layer in enumerate(probe(self.model.config))
        }
        mask = torch.ones(self._length, self._length, dtype=torch.bool).tril().expand(batch, 1, -1, -1)
        positions = torch.arange(self._length).expand(batch, -1)
        step = Pass(mask, positions, torch.zeros(batch, dtype=torch.int64))
        cache = CacheSeam(empty, step)
        self.hidden: list[torch.Tensor] = []
        stack = decoder_layers(self.model)

        def note(module: torch.nn.Module, args: tuple[torch.Tensor, ...], *output: torch.Tensor) -> None:
            self.hidden.append((output[0] if output else args[0])[:, self._first :])

        hooks = [stack[0].register_forward_pre_hook(note), *(layer.register_forward_hook(note) for layer in stack)]
        try:
            logits = self._pass(step, cache, self._ids[:, :-1], self._first)
        finally:
            for hook in hooks:
                hook.remove()
        self._cache = cache.present
        self.wanted = logits.argmax(-1)

    def _pass(
        self, step: Pass, cache: CacheSeam, ids: torch.Tensor, first: int = 0, last: int | None = None
    ) -> torch.Tensor:
        """Logits of the rows ``first`` to ``last``."""
        rows = torch.arange(first, ids.shape[1] if last is None else last)
        with seamed(self.model), step.active():
            out = self.model(
                input_ids=ids,
                position_ids=step.position_ids,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=rows,
            )
        logits: torch.Tensor = out.logits
        return logits

    @contextmanager
    def _entering(self, hidden: torch.Tensor) -> Iterator[None]:
        """Layer 0 gets ``hidden`` instead of the embedding."""
        first = decoder_layers(self.model)[0]
        hook = first.register_forward_pre_hook(lambda module, args: (hidden, *args[1:]))
        try:
            yield
        finally:
            hook.remove()


class SkippedLayer(torch.nn.Module):
    """Stands where a decoder layer was and passes the hidden state on."""

    def forward(self, hidden_states: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        return hidden_states


@contextmanager
def running(model: PreTrainedModel, layers: Sequence[int]) -> Iterator[None]:
    """While active, ``model`` runs only ``layers``; they keep their numbers and cache slots."""
    stack = decoder_layers(model)
    originals = list(stack)
    for number in set(range(len(stack))) - set(layers):
        stack[number] = SkippedLayer()
    try:
        yield
    finally:
        for number, layer in enumerate(originals):
            stack[number] = layer


def _prompt_ids(tokenizer: Tokenizer, count: int, tokens: int, model: PreTrainedModel) -> torch.Tensor:
    """[count, length] ids: the built-in prompts cut to one length, so rows need no padding."""
    encoded = [tokenizer.encode(text).ids for text in PROMPTS[:count]]
    room = positions_of(model.config) or 1 << 30
    length = min(_LONGEST_PROMPT, room - tokens, *(len(ids) for ids in encoded))
    if length < 1:
        raise ExportError(
            f"the model has {room} positions, too few to measure a self-draft; choose its layers with --self-draft"
        )
    return torch.tensor([ids[:length] for ids in encoded])


@torch.no_grad()
def _continue(model: PreTrainedModel, ids: torch.Tensor, tokens: int) -> torch.Tensor:
    """``ids`` [batch, length] with ``tokens`` greedy tokens appended to each."""
    cache, new = DynamicCache(), ids
    for _ in range(tokens):
        out = model(input_ids=new, past_key_values=cache, use_cache=True, logits_to_keep=1)
        new = out.logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat((ids, new), dim=1)
    return ids
