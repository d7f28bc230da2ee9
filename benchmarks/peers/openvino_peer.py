"""OpenVINO GenAI on the GGUF file in types that it reads: 4 and 8 bits, and 16 bits computed in bfloat16.

Plain, and with its prompt lookup.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from benchmarks.peers.models import SharedModel
from benchmarks.peers.protocol import Candidate, Missing, Stopwatch, Timed, missing_package

_KINDS = {"int4": "Q4_0", "int8": "Q8_0", "bf16": "F16"}
_FAMILIES = {"int4": "int4", "int8": "int8", "bf16": "fp32"}
_LOOKUP_TOKENS, _LOOKUP_NGRAM = 5, 3  # its documentation's values


class OpenVinoPeer:
    """Greedy ``generate`` of an ``LLMPipeline`` on token ids."""

    setting = None

    def __init__(self, model: SharedModel, precision: str, threads: int, *, lookup: bool) -> None:
        try:
            import openvino_genai
        except ImportError as error:
            raise missing_package("openvino-genai") from error
        self.name = _name(precision, lookup)
        self.precision, self.family = precision, _FAMILIES[precision]
        self._genai: Any = openvino_genai
        options: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads}
        if precision == "bf16":
            options["INFERENCE_PRECISION_HINT"] = "bf16"
        if lookup:
            options["prompt_lookup"] = True
        try:
            self._pipeline = openvino_genai.LLMPipeline(str(model.gguf(_KINDS[precision])), "CPU", **options)
        except RuntimeError as error:
            raise Missing(f"OpenVINO cannot use {model.source}: {error}") from error
        self._lookup = lookup

    def generate(self, prompt: Sequence[int], max_new_tokens: int) -> Timed:
        """Tokens arrive through a streamer; an end-of-text token does not stop it."""
        import numpy as np
        import openvino

        config = self._genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos = max_new_tokens, True
        if self._lookup:
            config.num_assistant_tokens, config.max_ngram_size = _LOOKUP_TOKENS, _LOOKUP_NGRAM
        ids = np.array([list(prompt)], np.int64)
        tokens = self._genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
        watch = Stopwatch()
        self._pipeline.generate(tokens, config, _streamer(self._genai, watch))
        return watch.result()


def _streamer(genai: Any, watch: Stopwatch) -> Any:
    class Arrivals(genai.StreamerBase):  # type: ignore[misc]  # the package has no types
        def write(self, tokens: int | list[int]) -> Any:
            watch.arrived([tokens] if isinstance(tokens, int) else tokens)
            return genai.StreamingStatus.RUNNING

        def end(self) -> None:
            """Nothing is held back."""

    return Arrivals()


def _name(precision: str, lookup: bool) -> str:
    return f"OpenVINO GenAI {precision}{', prompt lookup' if lookup else ''}"


def candidates(model: SharedModel, threads: int) -> Iterator[Candidate]:
    """Every precision, plain and with prompt lookup."""
    for precision in _KINDS:
        for lookup in (False, True):
            make = partial(OpenVinoPeer, model, precision, threads, lookup=lookup)
            yield Candidate(_name(precision, lookup), make)
