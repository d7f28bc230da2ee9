"""Whatever a config.json holds, reading a draft ends with a draft or with an error of this project."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

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


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One folder of each format."""
    root = tmp_path_factory.mktemp("formats")
    return {name: write(root / name.replace(" ", "-")).folder for name, write in WRITERS.items()}


@settings(
    max_examples=800, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
@pytest.mark.parametrize("name", WRITERS)
@given(data=st.data())
def test_one_or_two_fields_with_any_value(
    folders: dict[str, Path], target: Target, name: str, data: st.DataObject
) -> None:
    path = folders[name] / "config.json"
    before = path.read_text()
    config = json.loads(before)
    try:
        for place in data.draw(st.lists(st.sampled_from(places(config)), min_size=1, max_size=2)):
            section = config
            for key in place[:-1]:
                section = section.get(key, {}) if isinstance(section, dict) else {}
            if isinstance(section, dict):
                section[place[-1]] = data.draw(VALUES)
        path.write_text(json.dumps(config))
        try:
            draft = recognise(str(folders[name]))
        except DsparkError as error:
            assert str(error)
            return
        report = check_pair(target.checkpoint, draft)
        assert report.ok == (report.fitted is not None)
        assert isinstance(draft, DraftCheckpoint), "a drafter is never taken for a language model"
    finally:
        path.write_text(before)
