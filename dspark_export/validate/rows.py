"""Finds a matrix among many that may be larger: its rows in order, whichever way either of them is turned.

Rows are compared by a few random projections first, which rounding hardly moves, and by all of their numbers then.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from dspark_export.validate.graph_weights import Matrix

Tensor = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]
_PROJECTIONS = 16
_NEAR, _NEAR_ROUNDED = 0.02, 0.5
"""How far projections of the same row may be apart, relative to the row's."""
_STEPS = 1.01
_SHIFTS = 4
_LAYER = re.compile(r"(?:^|\.)(?:layers?|h|blk|blocks?)\.(\d+)\.")
_PIECE = 1 << 22


@dataclass
class _Side:
    """A matrix as rows: its own, or its columns where ``turned``. ``covered``: rows that are known to be of a file."""

    matrix: Matrix
    turned: bool
    sketch: Tensor
    covered: Mask = field(init=False)

    def __post_init__(self) -> None:
        self.covered = np.zeros(len(self.sketch), np.bool_)

    @property
    def near(self) -> float:
        return _NEAR if self.matrix.steps is None else _NEAR_ROUNDED

    def _as_rows(self, whole: Tensor) -> Tensor:
        return whole.T if self.turned else whole

    def hold(self, rows: Tensor, shift: int) -> Mask:
        """Which of ``rows`` are here, row i at ``i + shift``."""
        places = np.arange(len(rows)) + shift
        inside = np.flatnonzero((places >= 0) & (places < len(self.sketch)))
        found = np.zeros(len(rows), np.bool_)
        found[inside] = self._equal(rows[inside], places[inside])
        self.covered[places[found]] = True
        return found

    def _equal(self, rows: Tensor, places: Tensor) -> Mask:
        """Whether each row is the one at its place, but for rounding."""
        mine = self._as_rows(self.matrix.read())
        steps = None if self.matrix.steps is None else self._as_rows(self.matrix.steps())
        found = np.zeros(len(rows), np.bool_)
        for some in _pieces(np.arange(len(rows)), mine.shape[1]):
            here, there = places[some], rows[some]
            if steps is None:
                found[some] = (rounded(there, self.matrix) == mine[here]).all(1)
            else:
                allowed = _STEPS * steps[here] + 1e-6 * np.abs(there)
                found[some] = (np.abs(there - mine[here]) <= allowed).all(1)
        return found


class Rows:
    """The rows of all ``matrices``."""

    def __init__(self, matrices: Sequence[Matrix]) -> None:
        random = np.random.default_rng(0)
        widths = sorted({size for matrix in matrices for size in matrix.shape})
        self._bases = {width: random.standard_normal((width, _PROJECTIONS), np.float32) for width in widths}
        self._sides: dict[int, list[_Side]] = {width: [] for width in widths}
        self._matrices = matrices
        for matrix in matrices:
            whole = matrix.read()
            for turned in (False, True):
                rows = whole.T if turned else whole
                self._sides[rows.shape[1]].append(_Side(matrix, turned, rows @ self._bases[rows.shape[1]]))

    def find(self, rows: Tensor, name: str) -> Mask:
        """Which of ``rows`` [n, width] of the tensor ``name`` are in a matrix of the same layer, in order.

        Rows of zeros may be missing.
        """
        if rows.shape[1] not in self._bases:
            return np.zeros(len(rows), np.bool_)
        sketch = rows @ self._bases[rows.shape[1]]
        size = np.sqrt(np.square(sketch).sum(1))
        found: Mask = size == 0
        sample = _sample(size)
        for side in self._sides[rows.shape[1]] if len(sample) else ():
            if not same_layer(name, side.matrix.name):
                continue
            apart = _distances(sketch[sample], side.sketch)
            near = apart.min(1) <= np.square(side.near * size[sample])
            if near.sum() >= min(2, len(sample)):
                for shift, _ in Counter((apart.argmin(1) - sample)[near].tolist()).most_common(_SHIFTS):
                    found |= side.hold(rows, shift)
        return found

    def uncovered(self, large: int) -> dict[str, int]:
        """Rows that are of no file, by the names of matrices with at least ``large`` elements."""
        left: dict[str, int] = {
            matrix.name: min(matrix.shape) for matrix in self._matrices if np.prod(matrix.shape) >= large
        }
        for sides in self._sides.values():
            for side in sides:
                if side.matrix.name in left:
                    left[side.matrix.name] = min(left[side.matrix.name], _new(side))
        return {name: count for name, count in left.items() if count}


def same_layer(one: str, other: str) -> bool:
    """Whether two names may be of one layer: not if both have a number and these differ."""
    numbers = {match[1] for name in (one, other) if (match := _LAYER.search(name))}
    return len(numbers) < 2


def rounded(values: Tensor, like: Any) -> Tensor:
    """``values`` as the floats of ``like.dtype``, in float32."""
    kind = like.dtype.numpy()
    with np.errstate(over="ignore"):
        return values if kind == np.float32 else values.astype(kind).astype(np.float32)


def _new(side: _Side) -> int:
    """Rows that are not covered and neither zero nor the same as a covered one."""
    if side.covered.all():
        return 0
    known = {row.tobytes() for row in side.sketch[side.covered]} | {np.zeros(_PROJECTIONS, side.sketch.dtype).tobytes()}
    return sum(row.tobytes() not in known for row in side.sketch[~side.covered])


def _sample(size: Tensor) -> Tensor:
    """A few rows, spread over all and the largest ones, none of them zero."""
    there = np.flatnonzero(size > 0)
    spread = there[np.linspace(0, len(there) - 1, min(6, len(there))).astype(int)]
    found: Tensor = np.unique(np.concatenate([spread, there[np.argsort(-size[there])[:4]]]))
    return found


def _distances(some: Tensor, others: Tensor) -> Tensor:
    """Squares of distances between rows [n, k] and [m, k] as [n, m]."""
    found: Tensor = np.square(some).sum(1)[:, None] + np.square(others).sum(1) - 2 * (some @ others.T)
    return found


def _pieces(places: Tensor, width: int) -> Iterator[Tensor]:
    """``places`` in pieces that make no more than 4 million numbers with ``width`` each."""
    count = max(1, _PIECE // max(1, width))
    for begin in range(0, len(places), count):
        yield places[begin : begin + count]
