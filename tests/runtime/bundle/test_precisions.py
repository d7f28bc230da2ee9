"""The table of precisions is whole, and whatever offers precisions offers these."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest

from benchmarks import clean_builds
from benchmarks.peers import own
from dspark_runtime.bundle.manifest import Precision
from dspark_runtime.bundle.precisions import FLOAT_TYPES, PRECISIONS, Activations, Weights, listed

ROOT = Path(__file__).resolve().parents[3]


def test_every_name_has_a_row() -> None:
    assert tuple(PRECISIONS) == get_args(Weights) and tuple(FLOAT_TYPES) == get_args(Activations)


@pytest.mark.parametrize("weights", PRECISIONS)
def test_a_row_is_of_floats_or_of_integers(weights: Weights) -> None:
    kind = PRECISIONS[weights]
    assert (kind.dtype is None) == kind.quantized
    assert (kind.draft_within is not None) == (kind.bits is not None)
    assert not kind.blocked or kind.bits
    assert kind.integer_products == (kind.bits is not None and not kind.blocked)
    assert not kind.kept or (kind.quantized and kind.bits is None and kind.stored_within == 0)
    assert Precision(weights=weights).quantized == kind.quantized


def test_integers_compute_in_what_is_asked_for() -> None:
    assert PRECISIONS["bf16"].computes_in("fp32") == "bfloat16"
    assert PRECISIONS["int4"].computes_in("fp16") == "float16"


def test_names_in_a_sentence() -> None:
    assert listed(["a"]) == "a" and listed(["a", "b"], "and") == "a and b" and listed("abc") == "a, b or c"


def test_benchmarks_know_them() -> None:
    assert {weights for _, weights in clean_builds.BUILDS} == set(PRECISIONS)
    assert own.MEASURED == ("fp32", "w8a8", "int8", "int4")


def test_docs_name_them() -> None:
    precision, bundle = ((ROOT / f"docs/{name}.md").read_text(encoding="utf-8") for name in ("precision", "bundle"))
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|", precision.split("## Which one")[0], re.MULTILINE))
    assert tuple(rows) == tuple(PRECISIONS)
    for name, kind in PRECISIONS.items():
        assert f"`{name}`" in bundle
        assert kind.dtype is None or kind.dtype in rows[name]
        assert not kind.blocked or f"{kind.bits}-bit blocks of {kind.block}" in rows[name]
