"""Whether a bundle is exact by default: as requested, otherwise by what is expensive and what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dspark_export.build.manifest import ExactnessWarning, measured_precision, precision
from dspark_export.build.options import BuildOptions
from dspark_runtime.bundle.manifest import Precision, RowNoise


def noise(among_several: float) -> RowNoise:
    return RowNoise(max_abs_logit_diff=1.0, without_single_rows=among_several, rows=(1, 2, 4), positions=8)


def options(**given: Any) -> BuildOptions:
    return BuildOptions("model", Path("out"), **given)


def settled(asked: BuildOptions, found: RowNoise | None) -> Precision:
    return measured_precision(precision(asked), found, asked)


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_blocks_are_exact_behind_a_draft_where_rows_agree(weights: Any) -> None:
    drafted = options(precision=weights, drafts=("draft",))
    assert settled(drafted, noise(0.0)).exact
    assert not settled(drafted, noise(0.1)).exact and not settled(drafted, None).exact
    assert not settled(options(precision=weights), noise(0.0)).exact
    assert not settled(options(precision=weights, drafts=("draft",), exact=False), noise(0.0)).exact


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_exact_text_that_takes_float_products_is_made_with_a_warning(weights: Any) -> None:
    asked = options(precision=weights, exact=True)
    assert settled(asked, noise(0.0)).exact
    with pytest.warns(ExactnessWarning, match=r"is 0\.1; leave out --exact"):
        assert settled(asked, noise(0.1)).exact
    with pytest.warns(ExactnessWarning, match="was not measured"):
        assert settled(asked, None).exact


@pytest.mark.parametrize("weights", ["fp32", "fp16", "bf16", "w8a8"])
def test_others_are_exact_whatever_was_measured(weights: Any) -> None:
    assert settled(options(precision=weights), noise(0.1)).exact
    assert not settled(options(precision=weights, exact=False), noise(0.0)).exact


def test_drafters_give_chains_where_branches_would_not_be_exact() -> None:
    assert options(precision="w8a8").chains_only and options(precision="w8a8", exact=False).chains_only
    assert options(precision="int8", drafts=("draft",)).chains_only
    assert not options(precision="int8", drafts=("draft",), exact=False).chains_only
    assert not options(precision="int4", drafts=("draft",), activations="fp16").chains_only
    assert not options(precision="fp32", drafts=("draft",)).chains_only


def test_blocks_of_eight_bits_are_larger() -> None:
    assert precision(options(precision="int8")).block_size == 64
    assert precision(options(precision="int4")).block_size == 32
    assert precision(options(precision="int8", block_size=128)).block_size == 128
    assert precision(options(precision="w8a8")).block_size is None
