"""EAGLE-3: a layer that predicts the target's next features and from them the next token, step by step.

Context row i pairs the target's features of position i with the token after it, and has position i. Its output
predicts the token after that one. A step feeds the drafter's own output back instead of features. After verification
all step rows are dropped and the committed rows enter with the target's real features.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dspark_runtime.arrays import AnyArray, FloatArray, IntArray, Runs
from dspark_runtime.backends.protocol import CacheMemory, Features, FeatureStore, GraphEngine, GraphRunner, ResidentTaps
from dspark_runtime.bundle.contract import LOGIT_ROWS, LOGITS
from dspark_runtime.bundle.draft_contract import DRAFT_HIDDEN, EXTEND, RECURRENT_HIDDEN, STEP, TARGET_FEATURES
from dspark_runtime.bundle.manifest import DrafterEntry, EagleFacts
from dspark_runtime.drafters.estimates import DraftSampling
from dspark_runtime.drafters.parts import DrafterParts, required
from dspark_runtime.drafters.stepping import SteppingDrafter
from dspark_runtime.errors import BackendError
from dspark_runtime.speculation.kv_cache import KvCache


class Eagle3Drafter(SteppingDrafter):
    """See the module's text.

    Args:
        name: as in the manifest.
        extend: the graph that reads the target's features. ``step``: the one that reads its own output.
        facts: its taps and trained steps.
        vocab_size: of the target. ``target_ids``: target's id of every draft token, None where they are the same.
        positions: positions the draft was made for.
        width: nodes per level of the tree, 1 for a chain.
        sampling: how tokens are drafted for requests with a temperature.
        pass_ms: milliseconds of a pass, where known.
    """

    def __init__(
        self,
        name: str,
        extend: GraphEngine,
        step: GraphEngine,
        facts: EagleFacts,
        *,
        vocab_size: int,
        positions: int,
        target_ids: IntArray | None = None,
        width: int = 2,
        sampling: DraftSampling = "coupled",
        pass_ms: float | None = None,
    ) -> None:
        super().__init__(
            name,
            extend,
            vocab_size=vocab_size,
            positions=positions,
            target_ids=target_ids,
            depth=facts.steps,
            width=width,
            sampling=sampling,
            pass_ms=pass_ms,
        )
        self.taps = facts.taps
        self._step_engine = step
        self._runners: tuple[GraphRunner, GraphRunner] | None = None
        self._features: FeatureStore | None = None
        self._hidden: dict[int, dict[int, AnyArray]] = {}  # by row, then node: what its children are fed

    @classmethod
    def from_entry(cls, entry: DrafterEntry, parts: DrafterParts) -> Eagle3Drafter:
        """The drafter of a bundle that ``entry`` describes."""
        extend = entry.graph_name
        return cls(
            entry.name,
            parts.engine(extend),
            parts.engine(extend.removesuffix(EXTEND) + STEP),
            required(entry.eagle3, entry),
            vocab_size=parts.vocab_size,
            positions=parts.positions(entry),
            target_ids=parts.target_ids(entry),
            sampling=parts.options.sampling,
            width=parts.options.branches or 2,
            pass_ms=parts.pass_ms(extend),
        )

    def _open(self, cache: KvCache, target: CacheMemory) -> None:
        self._runners = (self._engine.open(cache.memory), self._step_engine.open(cache.memory))
        self._features = self._runners[0].features(target)
        self.resident = self._features.resident

    @property
    def _store(self) -> FeatureStore:
        return self.attached(self._features)

    def observe(self, request: int, row: int, features: AnyArray) -> None:
        """Keep features of new context rows for the next pass."""
        self._store.add(row, features)

    def collect(
        self, request: int, row: int, taps: ResidentTaps, batch_row: int, rows: Sequence[int], columns: Runs
    ) -> None:
        """The same, on the device."""
        self._store.collect(row, taps, batch_row, rows, columns)

    def move(self, source: int, target: int) -> None:
        """Move context and pending features to another row."""
        super().move(source, target)
        self._store.move(source, target)

    def _waiting(self, row: int) -> int:
        waiting = self._store.waiting(row)
        text = self._texts.get(row)
        if text is not None and self.cache.lengths[row] + waiting != len(text) - 1:
            raise BackendError(
                f"drafter {self.name} has features of {self.cache.lengths[row] + waiting} rows of a text with "
                f"{len(text) - 1} context rows"
            )
        return waiting

    def _token_at(self, row: int, position: int) -> int:
        return self._texts[row][position + 1]

    def _feed(self, row: int, counts: Sequence[int], inputs: dict[str, Features]) -> None:
        features = self._store.take(row, counts, max(1, *counts))
        self._selected(0, row, 1).feed({**inputs, TARGET_FEATURES: features})

    def _run_extend(self, counts: Sequence[int], inputs: dict[str, Features]) -> FloatArray:
        features = self._store.take(0, counts, max(1, *counts))
        found = self._selected(0, 0, self._count).run({**inputs, TARGET_FEATURES: features})
        self._hidden = {i: {0: found[DRAFT_HIDDEN][i, max(taken - 1, 0)]} for i, taken in enumerate(counts)}
        logits: FloatArray = found[LOGITS]
        return logits

    def _run_step(self, chosen: dict[int, list[int]], inputs: dict[str, Features]) -> FloatArray:
        some = next(iter(self._hidden[next(iter(chosen))].values()))
        rows = inputs[LOGIT_ROWS].shape[1]
        hidden = np.zeros((self._count, rows, some.shape[-1]), some.dtype)
        parents = {g.request.row: g.parents for g in self._growths.values()}
        for row, nodes in chosen.items():
            for i, node in enumerate(nodes):
                hidden[row, i] = self._hidden[row][parents[row][node]]
        found = self._selected(1, 0, self._count).run({**inputs, RECURRENT_HIDDEN: hidden})
        for row, nodes in chosen.items():
            self._hidden[row].update({node: found[DRAFT_HIDDEN][row, i] for i, node in enumerate(nodes)})
        logits: FloatArray = found[LOGITS]
        return logits

    def _selected(self, which: int, first: int, count: int) -> GraphRunner:
        runner = self.attached(self._runners)[which]
        runner.select(first, count)
        return runner
