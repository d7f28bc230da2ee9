"""Bookkeeping of the KV cache: how many slots of each sequence are committed, and what moves when a pass is accepted.

Committed tokens fill the slots ``[0, length)``. A pass writes its rows to ``[length, length + rows)``; only
:meth:`KvCache.commit` makes some of them part of the sequence, all others are overwritten by the next pass. For a chain
the accepted rows already lie where they belong. For a tree they are compacted, in place, in all layers.
"""

from __future__ import annotations

from collections.abc import Sequence

from dspark_runtime.backends.protocol import CacheMemory
from dspark_runtime.errors import CapacityError

_STEP = 64  # capacities are multiples of this


class KvCache:
    """Committed lengths over a backend's cache memory.

    Args:
        memory: where keys and values live.
        limit: most slots a sequence may ever have; memory grows by doubling up to it.
    """

    def __init__(self, memory: CacheMemory, limit: int) -> None:
        self.memory = memory
        self.limit = limit
        self.lengths = [0] * memory.batch

    def reserve(self, slots: int) -> None:
        """Make room for ``slots`` slots in every sequence; CapacityError beyond the limit."""
        if slots <= self.memory.capacity:
            return
        if slots > self.limit:
            raise CapacityError(f"{slots} cache slots are needed and the limit is {self.limit}; shorten the request")
        grown = round_up(max(slots, 2 * self.memory.capacity))
        self.memory.resize(min(grown, self.limit), keep=max(self.lengths))

    def commit(self, sequence: int, path: Sequence[int]) -> None:
        """Keep the rows ``path`` (numbers within the last pass, ascending) of one sequence, in that order."""
        start = self.lengths[sequence]
        settled = 0
        while settled < len(path) and path[settled] == settled:
            settled += 1
        if settled < len(path):
            self.memory.gather(sequence, [start + row for row in path[settled:]], start + settled)
        self.lengths[sequence] = start + len(path)

    def rollback(self, sequence: int, length: int) -> None:
        """Forget the slots from ``length`` on; ValueError if fewer are committed."""
        if not 0 <= length <= self.lengths[sequence]:
            raise ValueError(f"cannot roll back to {length}: {self.lengths[sequence]} slots are committed")
        self.lengths[sequence] = length

    def clear(self, sequence: int) -> None:
        """Forget everything of one sequence: its row is for another one."""
        self.lengths[sequence] = 0

    def copy(self, source: int, target: int, length: int) -> None:
        """Let sequence ``target`` begin with the first ``length`` slots of ``source``, and hold nothing else.

        ValueError if fewer are committed.
        """
        if not 0 <= length <= self.lengths[source]:
            raise ValueError(f"cannot copy {length} slots: {self.lengths[source]} are committed")
        if target != source:
            self.memory.move(source, target, length)
        self.lengths[target] = length

    def replace(self, target: int, source: int) -> None:
        """Let sequence ``target`` become ``source``, whose row is free then: closes the gap a finished one leaves."""
        if target != source:
            self.copy(source, target, self.lengths[source])
            self.clear(source)


def round_up(slots: int) -> int:
    """``slots`` rounded up to a multiple of 64."""
    return -(-slots // _STEP) * _STEP
