"""The forms of ``--self-draft layers=...``."""

from __future__ import annotations

import pytest

from dspark_export.graphs.layer_choice import check_layers, describe_layers, parse_layers
from dspark_runtime.errors import UsageError


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("0-9", tuple(range(10))),
        ("0", (0,)),
        ("0,1,2,5", (0, 1, 2, 5)),
        ("0-3, 8-11", (0, 1, 2, 3, 8, 9, 10, 11)),
        (" 11 ", (11,)),
        ("5-5", (5,)),
        ("every=2", (0, 2, 4, 6, 8, 10, 11)),
        ("every=5", (0, 5, 10, 11)),
        ("every=12", (0, 11)),
    ],
)
def test_forms(text: str, layers: tuple[int, ...]) -> None:
    assert parse_layers(text, 12) == layers


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not understood"),
        ("a-b", "not understood"),
        ("1-2-3", "not understood"),
        ("-3", "not understood"),
        ("1,,2", "not understood"),
        ("1.5", "not understood"),
        ("9-3", "give 3-9"),
        ("3-12", "layers 0 to 11"),
        ("0-99999999999", "layers 0 to 11"),
        ("0,0", "ascending"),
        ("5,3", "ascending"),
        ("0-5,3-8", "ascending"),
        ("every=", "from 2 to 12"),
        ("every=1", "from 2 to 12"),
        ("every=13", "from 2 to 12"),
        ("every=-2", "from 2 to 12"),
    ],
)
def test_refusals_say_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_layers(text, 12)


def test_empty_and_described() -> None:
    with pytest.raises(UsageError, match="at least one"):
        check_layers((), 12)
    assert describe_layers((0, 1, 2, 5, 7, 8)) == "0-2,5,7-8"
    assert parse_layers(describe_layers((0, 1, 2, 5, 7, 8)), 12) == (0, 1, 2, 5, 7, 8)
