"""Tiny real graphs, exported once per session, and helpers to run loops over them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from dspark_runtime.backends.ort import OrtEngine
from dspark_runtime.backends.protocol import EngineOptions
from dspark_runtime.bundle.contract import CacheLayer
from dspark_runtime.decoding.loop import DecodingLoop, LoopOptions
from dspark_runtime.decoding.observer import Observer
from dspark_runtime.decoding.request import Limits, make_requests
from dspark_runtime.decoding.schedule import Schedule
from dspark_runtime.decoding.sequence import Generation
from dspark_runtime.decoding.stream import Stream
from dspark_runtime.drafters.base import Drafter
from dspark_runtime.speculation.costs import PassCosts
from dspark_runtime.speculation.sampling import SamplingParams
from tests import tiny_models


@dataclass
class Tiny:
    """A tiny model: its engines and how to generate with it."""

    directory: Path
    cache: tuple[CacheLayer, ...]
    target: OrtEngine
    self_all: OrtEngine
    self_few: OrtEngine
    tokenizer: Tokenizer
    vocab_size: int = tiny_models.VOCAB
    positions: int = tiny_models.MAX_POSITIONS
    drafts: int = field(default=4)

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        drafters: Sequence[Drafter] = (),
        *,
        fixed: int | None = 4,
        tokens: int = 40,
        params: SamplingParams | None = None,
        seed: int = 0,
        stop: Sequence[str] = (),
        eos: Sequence[int] = (),
        options: LoopOptions | None = None,
        observer: Observer | None = None,
        rows: int | None = None,
    ) -> Stream:
        """A stream over a loop with a row for each prompt, or ``rows``; ``fixed`` drafts per pass, None adapts."""
        requests = make_requests(
            prompts,
            Limits(self.vocab_size, self.positions),
            max_new_tokens=tokens,
            params=params,
            seed=seed,
            stop=stop,
            eos=eos,
        )
        limit = max(len(request.prompt) for request in requests) + tokens
        return Stream(lambda: self.loop(rows or len(requests), limit, drafters, fixed, options, observer), requests)

    def loop(
        self,
        rows: int,
        limit: int,
        drafters: Sequence[Drafter] = (),
        fixed: int | None = 4,
        options: LoopOptions | None = None,
        observer: Observer | None = None,
    ) -> DecodingLoop:
        """A loop without requests."""
        schedule = Schedule(PassCosts(), fixed=fixed)
        return DecodingLoop(self.target, schedule, drafters, rows, limit, self.tokenizer, options, observer)

    def generate(self, prompts: Sequence[Sequence[int]], *args: object, **kwargs: object) -> list[Generation]:
        """Run a loop to its end."""
        stream = self.stream(prompts, *args, **kwargs)  # type: ignore[arg-type]
        for _ in stream:
            pass
        return stream.generations

    def tokens(self, prompts: Sequence[Sequence[int]], *args: object, **kwargs: object) -> list[list[int]]:
        """The tokens of :meth:`generate`."""
        return [generation.tokens for generation in self.generate(prompts, *args, **kwargs)]


def export_tiny(arch: str, directory: Path) -> Tiny:
    """Export target and two self-draft graphs of a tiny model and load them."""
    from dspark_export.bundle.weights import save_graphs
    from dspark_export.graphs.decoder import DecoderTrace
    from dspark_export.graphs.self_draft import export_self_draft
    from dspark_export.graphs.target import export_target
    from dspark_export.tracing.geometry import probe

    config, model = tiny_models.make(arch)
    cache = tuple(probe(config))
    every, few = tuple(range(len(cache))), (0, len(cache) - 1)
    trace = DecoderTrace.of(model)
    graphs = {
        "target": export_target(trace),
        "self_all": export_self_draft(trace, every),
        "self_few": export_self_draft(trace, few),
    }
    save_graphs(graphs, directory)
    options = EngineOptions(threads=1)
    layers = {"target": None, "self_all": every, "self_few": few}
    engines = {
        name: OrtEngine(directory / f"{name}.onnx", name=name, cache=cache, layers=layers[name], options=options)
        for name in graphs
    }
    tokenizer: Tokenizer = tiny_models.tokenizer().backend_tokenizer
    return Tiny(directory, cache, engines["target"], engines["self_all"], engines["self_few"], tokenizer)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A tiny llama."""
    return export_tiny("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def tiny_windowed(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A tiny gemma3 with sliding-window layers (window 8)."""
    return export_tiny("gemma3_text", tmp_path_factory.mktemp("gemma3"))
