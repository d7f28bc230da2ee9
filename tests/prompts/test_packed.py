"""The file of responses: it grows by whole records, says what it is from, and refuses what it cannot vouch for."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from dspark_export.prompts.answers import Response
from dspark_export.prompts.packed import MAGIC, Origin, PackedResponses, is_packed
from dspark_runtime.errors import BundleBusy, UsageError

ORIGIN = Origin("model", {"a.safetensors": "12"}, "ab", "w8a8", 49152, seed=3, temperatures=(0.0, 0.7))
ITEMS = [Response((1, 2, n), (n, 49151), 0.7 * (n % 2)) for n in range(20)]


def written(path: Path, origin: Origin = ORIGIN) -> bytes:
    with PackedResponses(path, origin) as file:
        file.add_prompt("why — и 为什么")
        file.add_source({"prompts": 3, "sha256": "ff"})
        file.add_source({"prompts": 3, "sha256": "ff"})
        for item in ITEMS:
            file.add(item)
    return path.read_bytes()


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "new" / "r.packed"
    size = len(written(path))
    found = PackedResponses(path)
    assert list(found) == ITEMS and len(found) == 20 and found.origin == ORIGIN
    assert found.own_prompts == ["why — и 为什么"] and found.sources == [{"prompts": 3, "sha256": "ff"}]
    assert is_packed(path) and size < 20 * (9 + 8 + 10) + 600  # 16 bits a token
    wide = [Response((100_000,), (7, 120_000), 0.0)]
    with PackedResponses(tmp_path / "wide", dataclasses.replace(ORIGIN, vocab_size=151_936)) as file:
        file.add(wide[0])
    assert list(PackedResponses(tmp_path / "wide")) == wide


def test_cut_anywhere_it_is_read_up_to_the_last_whole_record(tmp_path: Path) -> None:
    """And what is then added makes the file that was never cut."""
    path = tmp_path / "r.packed"
    whole = written(path)
    for size in [*range(0, len(whole), 7), len(whole) - 1]:
        path.write_bytes(whole[:size])
        with PackedResponses(path, ORIGIN) as file:
            assert list(file) == ITEMS[: len(file)]
            if not file.own_prompts:
                file.add_prompt("why — и 为什么")
            file.add_source({"prompts": 3, "sha256": "ff"})
            for item in ITEMS[len(file) :]:
                file.add(item)
        assert path.read_bytes() == whole


def test_what_is_damaged_or_foreign_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.packed"
    whole = bytearray(written(path))
    for place in np.linspace(20, len(whole) - 100, 12).astype(int):
        bad = bytearray(whole)
        bad[place] ^= 0x41
        path.write_bytes(bad)
        try:
            found = list(PackedResponses(path))
        except UsageError as error:
            assert "damaged" in str(error)
        else:  # a size that leads past the end looks like a torn record: what is before it is whole
            assert found == ITEMS[: len(found)]
    path.write_bytes(b"no responses at all")
    for origin in (None, ORIGIN):
        with pytest.raises(UsageError, match="not a file of packed responses"):
            PackedResponses(path, origin)
    assert path.read_bytes() == b"no responses at all"
    path.write_bytes(MAGIC)
    with pytest.raises(UsageError, match="no responses yet"):
        PackedResponses(path)
    with pytest.raises(UsageError, match="cannot read"):
        PackedResponses(tmp_path / "nowhere")


def test_responses_of_another_origin_are_not_mixed(tmp_path: Path) -> None:
    path = tmp_path / "r.packed"
    whole = written(path)
    others = (
        dataclasses.replace(ORIGIN, seed=4),
        dataclasses.replace(ORIGIN, files={"a.safetensors": "13"}),
        dataclasses.replace(ORIGIN, precision="fp32"),
        dataclasses.replace(ORIGIN, temperatures=(0.0,)),
    )
    for other, name in zip(others, ("seed", "files", "precision", "temperatures"), strict=True):
        with pytest.raises(UsageError, match=name):
            PackedResponses(path, other)
    assert path.read_bytes() == whole
    with PackedResponses(path, ORIGIN), pytest.raises(BundleBusy):
        PackedResponses(path, ORIGIN)
    with PackedResponses(path, ORIGIN) as file:
        assert len(file) == 20
