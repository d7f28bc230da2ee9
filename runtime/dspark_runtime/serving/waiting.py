"""Requests that wait for a row of the cache."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator
from typing import Protocol, TypeVar

AGING_SECONDS = 10.0
"""A request that has waited this long counts as one step more urgent."""


class Waiting(Protocol):
    """What a :class:`WaitingQueue` may hold: ``priority`` 0 to 9, 9 first, and when it came, in seconds."""

    priority: int
    submitted: float


Item = TypeVar("Item", bound=Waiting)


class WaitingQueue(Iterator[Item]):
    """Gives the most urgent request, of equals the one that came first.

    Urgency is ``priority`` plus one for every :data:`AGING_SECONDS` of waiting. All requests age alike, so two of them
    never change places: the order is known when a request comes, and whoever waits is overtaken only by requests that
    came less than ``9 * AGING_SECONDS`` later.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Item]] = []
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return len(self._heap)

    def push(self, item: Item) -> None:
        """Let a request wait."""
        heapq.heappush(self._heap, (item.submitted - AGING_SECONDS * item.priority, next(self._numbers), item))

    def __next__(self) -> Item:
        """Take the next request; StopIteration if none waits."""
        if not self._heap:
            raise StopIteration
        return heapq.heappop(self._heap)[2]

    def remove(self, items: set[int]) -> list[Item]:
        """Take out the requests whose ``id()`` is in ``items``, in no order."""
        gone = [entry[2] for entry in self._heap if id(entry[2]) in items]
        if gone:
            self._heap = [entry for entry in self._heap if id(entry[2]) not in items]
            heapq.heapify(self._heap)
        return gone

    def waiting(self) -> list[Item]:
        """All that wait, in no order."""
        return [entry[2] for entry in self._heap]
