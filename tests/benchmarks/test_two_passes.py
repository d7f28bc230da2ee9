"""What a second pass over a batch would bring."""

from __future__ import annotations

import pytest

from benchmarks.serving.two_passes import Rounds
from dspark_runtime.speculation.costs import PassCosts


def rounds(start: float) -> Rounds:
    """A pass of n rows takes ``start`` + n milliseconds."""
    return Rounds(PassCosts({rows: start + rows for rows in range(1, 65)}))


SURE, UNSURE = [0.99] * 8, [0.1] * 8


def test_two_passes_pay_where_padding_is_dear() -> None:
    values, cheap_start, dear_start = [SURE, UNSURE, UNSURE, UNSURE], rounds(1.0), rounds(30.0)
    assert cheap_start.one(values) == pytest.approx(cheap_start.plain(values))
    assert cheap_start.two(values) > 1.05 * cheap_start.one(values)
    assert cheap_start.ragged(values) > cheap_start.two(values)
    assert dear_start.two(values) == dear_start.one(values)  # the weights would be read twice


def test_all_kinds_agree_where_all_want_alike() -> None:
    kinds, values = rounds(20.0), [SURE, SURE]
    assert kinds.plain(values) < kinds.one(values) == kinds.two(values) == pytest.approx(kinds.ragged(values))
    assert rounds(1.0).one([[], []]) == rounds(1.0).ragged([[], []])
