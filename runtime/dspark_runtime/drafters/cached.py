"""What drafters with their own cache share: its rows follow the target's, and it catches up with new context.

The drafter's cache holds ``lengths[row]`` context rows of the sequence in that row. Context that arrived since then is
*pending*; it enters the cache with the next pass. Rows with a lot of it (a prompt) catch up alone, so that a batch is
not padded to the longest.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from dspark_runtime.backends.protocol import CacheMemory, FeatureStore, GraphEngine
from dspark_runtime.drafters.base import Drafter
from dspark_runtime.errors import BackendError
from dspark_runtime.speculation.kv_cache import KvCache, round_up

CATCH_UP_ROWS = 512  # pending rows per pass of a single sequence
ALONE_FROM = 16  # pending rows from which a sequence of a batch catches up alone
_FIRST_SLOTS = 2048


class CachedDrafter(Drafter):
    """Base of drafters with a cache of their own.

    Args:
        name: as in the manifest.
        engine: one of the drafter's graphs; all of them share the cache it allocates.
        scratch: slots behind the context that a round may write to.
        positions: positions the draft was made for; longer texts are not drafted for.
        pass_ms: milliseconds of one pass, where known.
    """

    def __init__(self, name: str, engine: GraphEngine, scratch: int, positions: int, pass_ms: float | None) -> None:
        self.name = name
        self.pass_ms = 0.5 if pass_ms is None else pass_ms
        self._engine = engine
        self._scratch = scratch
        self._catch_up = min(CATCH_UP_ROWS, engine.most_rows or CATCH_UP_ROWS)
        # Rows of a pass are padded to the longest of the batch, so that those behind the context need slots too.
        self._positions = positions if engine.slots is None else min(positions, engine.slots - scratch - self._catch_up)
        self._own: KvCache | None = None
        self._features: FeatureStore | None = None  # of drafters that read the target's
        self._count = 0
        self._times: dict[int, float] = {}  # milliseconds of a pass, by the sequences in it

    def attach(self, cache: KvCache) -> None:
        """Allocate the cache for as many sequences and slots as the target's."""
        behind = self._scratch + CATCH_UP_ROWS
        most = self._engine.slots or round_up(cache.limit + behind)
        first = min(most, round_up(min(cache.memory.capacity, _FIRST_SLOTS) + behind))
        self._own = KvCache(self._engine.allocate(cache.memory.batch, first), most)
        self._count = cache.memory.batch
        self._open(self._own, cache.memory)

    def select(self, count: int) -> None:
        """Draft for the first ``count`` rows of the cache; ``pass_ms`` is that of such a pass, or of the nearest."""
        if count != self._count and self._times:
            self.pass_ms = self._times[min(self._times, key=lambda known: abs(known - count))]
        self._count = count

    def move(self, source: int, target: int) -> None:
        """Move context to another row."""
        self.cache.replace(target, source)

    def reset(self, row: int) -> None:
        """Forget context and pending features of a row."""
        self.cache.clear(row)
        if self._features is not None:
            self._features.drop(row)

    def keep(self, row: int, length: int) -> int:
        """Forget all but the first ``length`` context rows, and what is pending."""
        return self.copy(row, row, length)

    def copy(self, source: int, target: int, length: int) -> int:
        """Copy the first ``length`` context rows, or all of them if there are fewer; what is pending stays pending."""
        held = min(length, self.cache.lengths[source])
        self.cache.copy(source, target, held)
        if self._features is None:
            return length  # what is missing is read from the text
        self._features.drop(target)
        return held

    @property
    def cache(self) -> KvCache:
        """The drafter's cache; BackendError before :meth:`attach`."""
        return self.attached(self._own)

    def _open(self, cache: KvCache, target: CacheMemory) -> None:
        """Open runners over the allocated cache; ``target`` is the memory of the target's."""
        raise BackendError(f"drafter {self.name} opens no engine")

    def _took(self, started: float) -> None:
        """Correct the time of a pass by one that began at ``started``; hiccups count twice the expected at most."""
        took = (time.perf_counter() - started) * 1e3
        self.pass_ms += 0.1 * (min(took, 2 * self.pass_ms) - self.pass_ms)
        self._times[self._count] = self.pass_ms


def alone(pending: Sequence[int], catch_up: int = CATCH_UP_ROWS) -> list[int]:
    """Rows that catch up alone before the batch runs, by their pending context and how much of it a pass takes."""
    most = catch_up if len(pending) == 1 else min(ALONE_FROM, catch_up)
    return [row for row, count in enumerate(pending) if count > most]
