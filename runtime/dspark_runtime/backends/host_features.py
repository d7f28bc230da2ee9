"""Features of the target in host memory, until a drafter takes them in; see FeatureStore."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dspark_runtime.arrays import AnyArray, Runs
from dspark_runtime.backends.protocol import ResidentTaps
from dspark_runtime.errors import BackendError


class HostFeatures:
    """See :class:`dspark_runtime.backends.protocol.FeatureStore`."""

    resident = False

    def __init__(self) -> None:
        self._parts: dict[int, list[AnyArray]] = {}
        self._counts: dict[int, int] = {}
        self._empty: AnyArray = np.zeros((0, 0), np.float32)

    def add(self, row: int, features: AnyArray) -> None:
        """See :class:`FeatureStore`."""
        self._parts.setdefault(row, []).append(features.copy())
        self._counts[row] = self.waiting(row) + len(features)
        self._empty = features[:0]

    def collect(self, row: int, taps: ResidentTaps, batch_row: int, rows: Sequence[int], columns: Runs) -> None:
        """See :class:`FeatureStore`; never called, see ``resident``."""
        raise BackendError("features of a device cannot be collected in host memory; add() takes them")

    def waiting(self, row: int) -> int:
        """See :class:`FeatureStore`."""
        return self._counts.get(row, 0)

    def move(self, source: int, target: int) -> None:
        """See :class:`FeatureStore`."""
        self._parts[target], self._counts[target] = self._parts.pop(source, []), self._counts.pop(source, 0)

    def drop(self, row: int) -> None:
        """See :class:`FeatureStore`."""
        self._parts.pop(row, None)
        self._counts.pop(row, None)

    def take(self, first: int, counts: Sequence[int], rows: int) -> AnyArray:
        """See :class:`FeatureStore`; padding is zero."""
        taken = np.zeros((len(counts), rows, self._empty.shape[1]), self._empty.dtype)
        for i, count in enumerate(counts):
            row = first + i
            parts = self._parts.get(row, ())
            held = parts[0] if len(parts) == 1 else np.concatenate(parts) if parts else self._empty
            taken[i, :count] = held[:count]
            self._parts[row] = [held[count:]] if len(held) > count else []
            self._counts[row] = len(held) - count
        return taken
