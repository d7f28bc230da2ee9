"""transformers in float32: plain, and with its prompt lookup."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

from benchmarks.peers.models import SharedModel
from benchmarks.peers.protocol import Candidate, Stopwatch, Timed

_LOOKUP_TOKENS = 10  # its documentation's value


class _Arrivals:
    """A streamer in the sense of transformers; the first thing it is given is the prompt."""

    def __init__(self) -> None:
        self.watch = Stopwatch()
        self._prompt_seen = False

    def put(self, value: Any) -> None:
        if self._prompt_seen:
            self.watch.arrived(value.flatten().tolist())
        self._prompt_seen = True

    def end(self) -> None:
        """Nothing is held back."""


class TransformersPeer:
    """Greedy ``generate`` with a dynamic cache."""

    precision = family = "fp32"
    setting = None

    def __init__(self, model: Any, lookup: bool) -> None:
        self.name = "transformers fp32, prompt lookup" if lookup else "transformers fp32"
        self._model = model
        self._options: dict[str, Any] = {"prompt_lookup_num_tokens": _LOOKUP_TOKENS} if lookup else {}

    def generate(self, prompt: Sequence[int], max_new_tokens: int) -> Timed:
        """Tokens arrive through a streamer."""
        import torch

        ids = torch.tensor([list(prompt)])
        arrivals = _Arrivals()
        with torch.inference_mode():
            self._model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                streamer=arrivals,
                **self._options,
            )
        return arrivals.watch.result()


def candidates(model: SharedModel, threads: int) -> Iterator[Candidate]:
    """Both share one model. ``threads`` is set for the whole process."""

    @cache
    def loaded() -> Any:
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        torch.set_num_threads(threads)
        result = AutoModelForCausalLM.from_pretrained(
            model.weights(), dtype=torch.float32, local_files_only=True, use_safetensors=True
        ).eval()
        result.generation_config.eos_token_id = None  # go on after an end-of-text token
        result.generation_config.pad_token_id = 0
        return result

    yield Candidate("transformers fp32", lambda: TransformersPeer(loaded(), lookup=False))
    yield Candidate("transformers fp32, prompt lookup", lambda: TransformersPeer(loaded(), lookup=True))
