"""Drafts with a separate small language model that shares the target's vocabulary.

Its cache holds the committed text, the anchor included. Rows of accepted drafts stay in it, since the next
round would compute the same ones again.
"""

from __future__ import annotations

from collections.abc import Sequence

from dspark_runtime.arrays import FloatArray, IntArray
from dspark_runtime.backends.protocol import CacheMemory, Features, GraphEngine, GraphRunner
from dspark_runtime.bundle.contract import LOGITS
from dspark_runtime.bundle.manifest import DrafterEntry
from dspark_runtime.drafters.estimates import DraftSampling
from dspark_runtime.drafters.parts import DrafterParts
from dspark_runtime.drafters.stepping import SteppingDrafter
from dspark_runtime.speculation.kv_cache import KvCache


class DraftModelDrafter(SteppingDrafter):
    """See the module's text.

    Args:
        name: as in the manifest.
        engine: the draft model's graph.
        vocab_size: of the target; the draft's may be padded to another size. ``readable``: ids of the draft's own.
        positions: positions the draft was made for.
        depth: most drafts in a row. ``width``: nodes per level of the tree.
        sampling: how tokens are drafted for requests with a temperature.
        pass_ms: milliseconds of a pass, where known.
    """

    def __init__(
        self,
        name: str,
        engine: GraphEngine,
        *,
        vocab_size: int,
        positions: int,
        target_ids: IntArray | None = None,
        depth: int = 8,
        width: int = 1,
        sampling: DraftSampling = "coupled",
        pass_ms: float | None = None,
        readable: int | None = None,
    ) -> None:
        super().__init__(
            name,
            engine,
            vocab_size=vocab_size,
            positions=positions,
            target_ids=target_ids,
            depth=depth,
            width=width,
            sampling=sampling,
            pass_ms=pass_ms,
            readable=readable,
        )
        self._runner: GraphRunner | None = None

    @classmethod
    def from_entry(cls, entry: DrafterEntry, parts: DrafterParts) -> DraftModelDrafter:
        """The drafter of a bundle that ``entry`` describes."""
        return cls(
            entry.name,
            parts.engine(entry.graph_name),
            vocab_size=parts.vocab_size,
            positions=parts.positions(entry),
            sampling=parts.options.sampling,
            width=parts.options.branches or 1,
            pass_ms=parts.pass_ms(entry.graph_name),
            readable=parts.rows_of(entry.graph_name),
        )

    def _open(self, cache: KvCache, target: CacheMemory) -> None:
        self._runner = self._engine.open(cache.memory)

    def commit(self, request: int, tokens: Sequence[int]) -> None:
        """Keep the rows of accepted drafts."""
        super().commit(request, tokens)
        growth = self._growths.pop(request, None)
        if growth is not None:
            places = growth.ran(list(tokens))
            self.cache.commit(growth.request.row, places)

    def _waiting(self, row: int) -> int:
        return len(self._texts[row]) - self.cache.lengths[row]

    def _token_at(self, row: int, position: int) -> int:
        return self._texts[row][position]

    def _feed(self, row: int, counts: Sequence[int], inputs: dict[str, Features]) -> None:
        self._selected(row, 1).feed(inputs)

    def _run_extend(self, counts: Sequence[int], inputs: dict[str, Features]) -> FloatArray:
        return self._run(inputs)

    def _run_step(self, chosen: dict[int, list[int]], inputs: dict[str, Features]) -> FloatArray:
        return self._run(inputs)

    def _run(self, inputs: dict[str, Features]) -> FloatArray:
        logits: FloatArray = self._selected(0, self._count).run(inputs)[LOGITS]
        return logits[:, :, : self._vocab_size]

    def _selected(self, first: int, count: int) -> GraphRunner:
        runner = self.attached(self._runner)
        runner.select(first, count)
        return runner
