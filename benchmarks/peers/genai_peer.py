"""onnxruntime-genai on models made by its own builder: float32, and 4 bits with 8-bit activations."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.peers.models import SharedModel
from benchmarks.peers.protocol import Candidate, Stopwatch, Timed, missing_package


class GenaiPeer:
    """A decoding loop over ``Generator``."""

    setting = None

    def __init__(self, folder: Path, precision: str, threads: int) -> None:
        try:
            import onnxruntime_genai
        except ImportError as error:
            raise missing_package("onnxruntime-genai") from error
        self.name = f"onnxruntime-genai {precision}"
        self.precision = self.family = precision
        self._genai: Any = onnxruntime_genai
        config = onnxruntime_genai.Config(str(folder))
        session = {"session_options": {"intra_op_num_threads": threads}}
        config.overlay(json.dumps({"model": {"decoder": session}}))
        self._model = onnxruntime_genai.Model(config)

    def generate(self, prompt: Sequence[int], max_new_tokens: int) -> Timed:
        """The prompt is run by ``append_tokens``. An end-of-text token ends the text: what came until then counts."""
        params = self._genai.GeneratorParams(self._model)
        params.set_search_options(do_sample=False, max_length=len(prompt) + max_new_tokens)
        watch = Stopwatch()
        generator = self._genai.Generator(self._model, params)
        generator.append_tokens(list(prompt))
        while not generator.is_done() and watch.count < max_new_tokens:
            generator.generate_next_token()
            watch.arrived(int(token) for token in generator.get_next_tokens())
        return watch.result()


def candidates(model: SharedModel, threads: int) -> Iterator[Candidate]:
    """float32 and int4."""
    for precision in ("fp32", "int4"):
        yield Candidate(f"onnxruntime-genai {precision}", partial(_made, model, precision, threads))


def _made(model: SharedModel, precision: str, threads: int) -> GenaiPeer:
    return GenaiPeer(model.genai(precision), precision, threads)
