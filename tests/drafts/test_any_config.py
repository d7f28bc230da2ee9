"""Whatever a config.json holds, reading a draft ends with a draft or with an error of this project."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dspark_export.drafts.formats import DraftCheckpoint, recognise
from dspark_export.drafts.pair_check import check_pair
from dspark_runtime.errors import DsparkError
from tests.drafts.conftest import Target
from tests.drafts.writers import (
    Written,
    write_classic_eagle3,
    write_deepspec,
    write_specforge,
    write_speculators,
    write_zlab,
)

WRITERS: dict[str, Callable[[Path], Written]] = {
    "dspark": write_deepspec,
    "gemma4": partial(write_deepspec, family="gemma4"),
    "eagle3": partial(write_deepspec, kind="eagle3"),
    "zlab": write_zlab,
    "specforge": write_specforge,
    "speculators": partial(write_speculators, draft_vocab=96),
    "speculators eagle3": partial(write_speculators, kind="eagle3", draft_vocab=96),
    "classic": write_classic_eagle3,
}
KINDS = (None, True, -3, 0, 1, 2**33, 0.5, 1e9, "", "qwen3", "4", [], [1, 0], {}, {"rope_type": "x", "factor": 2.0})
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**33) | st.floats(-2, 1e9) | st.sampled_from(["", "qwen3", "4"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["rope_type", "factor", "x"]), inner),
    max_leaves=6,
)


def places(config: dict[str, Any]) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []
    for key, value in config.items():
        found.append((key,))
        if isinstance(value, dict):
            found += [(key, *place) for place in places(value)]
    return found


class Format(NamedTuple):
    """A folder of a format, and its config.json as it was written."""

    folder: Path
    config: dict[str, Any]


@pytest.fixture(scope="module")
def formats(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Format]:
    """One of each."""
    root = tmp_path_factory.mktemp("formats")
    folders = {name: write(root / name.replace(" ", "-")).folder for name, write in WRITERS.items()}
    return {name: Format(folder, json.loads((folder / "config.json").read_text())) for name, folder in folders.items()}


def check(folder: Path, target: Target, config: dict[str, Any]) -> None:
    """Read the folder with this config.json."""
    (folder / "config.json").write_text(json.dumps(config))
    try:
        draft = recognise(str(folder))
    except DsparkError as error:
        assert str(error)
        return
    report = check_pair(target.checkpoint, draft)
    assert report.ok == (report.fitted is not None)
    assert isinstance(draft, DraftCheckpoint), "a drafter is never taken for a language model"


def changed(config: dict[str, Any], values: dict[tuple[str, ...], Any]) -> dict[str, Any]:
    """A copy with these values at their places, unless an earlier one took the place away."""
    config = copy.deepcopy(config)
    for place, value in values.items():
        section: Any = config
        for key in place[:-1]:
            section = section.get(key, {}) if isinstance(section, dict) else {}
        if isinstance(section, dict):
            section[place[-1]] = value
    return config


@pytest.mark.parametrize("name", WRITERS)
def test_each_field_with_each_kind_of_value(formats: dict[str, Format], target: Target, name: str) -> None:
    folder, config = formats[name]
    for place in places(config):
        for value in KINDS:
            try:
                check(folder, target, changed(config, {place: value}))
            except Exception as error:
                error.add_note(f"{place} = {value!r}")
                raise


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
@pytest.mark.parametrize("name", WRITERS)
@given(data=st.data())
def test_two_fields_with_any_value(formats: dict[str, Format], target: Target, name: str, data: st.DataObject) -> None:
    folder, config = formats[name]
    two = data.draw(st.lists(st.sampled_from(places(config)), min_size=2, max_size=2, unique=True))
    check(folder, target, changed(config, {place: data.draw(VALUES) for place in two}))
