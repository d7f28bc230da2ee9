"""Passes of a trained drafter, and the trees that go to the target, as the runtime makes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dspark_export.drafts.trace import engine_with_inner_outputs
from dspark_runtime import Bundle
from dspark_runtime.backends.protocol import (
    AnyArray,
    CacheMemory,
    Features,
    FeatureStore,
    GraphEngine,
    GraphRunner,
    StepBuffers,
)
from dspark_runtime.bundle.contract import past_name
from dspark_runtime.decoding.loop import DecodingLoop, LoopOptions
from dspark_runtime.decoding.request import make_requests
from dspark_runtime.decoding.schedule import Schedule
from dspark_runtime.decoding.statistics import Statistics
from dspark_runtime.drafters.choice import DrafterChoice
from dspark_runtime.drafters.parts import DraftOptions
from dspark_runtime.speculation.tree import TokenTree


@dataclass(frozen=True)
class Call:
    """One pass of a drafter's graph: every input, every output, and the cache it found."""

    graph: str
    inputs: dict[str, AnyArray]
    found: dict[str, AnyArray]
    cache: dict[str, AnyArray]


class _RecordingEngine:
    """Passes everything on and remembers it."""

    def __init__(self, engine: GraphEngine, calls: list[Call]) -> None:
        self.name, self.slots, self.most_rows = engine.name, engine.slots, engine.most_rows
        self._engine, self._calls = engine, calls

    def allocate(self, batch: int, capacity: int) -> CacheMemory:
        """See :class:`GraphEngine`."""
        return self._engine.allocate(batch, capacity)

    def open(self, memory: CacheMemory) -> GraphRunner:
        """See :class:`GraphEngine`."""
        return _RecordingRunner(self.name, self._engine.open(memory), memory, self._calls)


class _RecordingRunner:
    def __init__(self, name: str, runner: GraphRunner, memory: CacheMemory, calls: list[Call]) -> None:
        self._name, self._runner, self._memory, self._calls = name, runner, memory, calls
        self._rows = slice(0, 1)

    def select(self, first: int, count: int) -> None:
        self._rows = slice(first, first + count)
        self._runner.select(first, count)

    def features(self, target: CacheMemory) -> FeatureStore:
        return self._runner.features(target)

    def feed(self, inputs: Mapping[str, Features]) -> None:
        self.run(inputs)

    def run(self, inputs: Mapping[str, Features]) -> dict[str, AnyArray]:
        tensors = self._memory.tensors()  # type: ignore[attr-defined]
        cache = {past_name(*key): array[self._rows].copy() for key, array in tensors.items()}
        kept = {name: np.array(value) for name, value in inputs.items()}
        found = self._runner.run(inputs)
        self._calls.append(Call(self._name, kept, found, cache))
        return found


class _RecordingLoop(DecodingLoop):
    """Remembers the trees that go to the target, by the position of their anchor."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self.verified: dict[int, TokenTree] = {}

    def _fill(self, trees: Sequence[TokenTree]) -> StepBuffers:
        self.verified[self.cache.lengths[0]] = trees[0]
        return super()._fill(trees)


def run_recorded(
    bundle: Bundle, prompt: Sequence[int], name: str, tokens: int, options: DraftOptions
) -> tuple[list[Call], dict[int, TokenTree], list[int], Statistics]:
    """A greedy text of one drafter, which always drafts as much as it can: its passes, the verified trees, the text."""
    calls: list[Call] = []

    def engine(graph: str, batched: bool) -> GraphEngine:
        return _RecordingEngine(engine_with_inner_outputs(bundle, graph), calls)

    choice = DrafterChoice(bundle.files, bundle.schedule.costs, bundle.engine, engine)
    rows = 2 if bundle.exact else 1
    loop = _RecordingLoop(
        bundle.engine("target"),
        Schedule(bundle.schedule.costs, fixed=31, min_rows=rows),
        choice.make(name, False, options),
        make_requests([list(prompt)], bundle.limits, max_new_tokens=tokens),
        options=LoopOptions(min_rows=rows),
    )
    for _ in loop:
        pass
    generation = loop.generations()[0]
    return calls, loop.verified, list(generation.tokens), generation.stats
