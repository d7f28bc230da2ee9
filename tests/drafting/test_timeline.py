"""Spans of host and streams, and the picture of them: measured on the imitated device, as late as it may be."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from dspark_export.bench.spans import BESIDE, HOST, HostSpans, Span, SpannedCuda
from dspark_export.bench.timeline import draw_timeline, host_microseconds, last_rounds
from tests.drafting.conftest import Pairs
from tests.drafting.imitated import PROMPTS, Opened
from tests.engines.host_cuda import HostCuda

ROOT = Path(__file__).resolve().parents[2]
OPTIONS: dict[str, Any] = {"speculate": "ngram+dspark", "max_new_tokens": 16, "draft_length": 3, "ignore_eos": True}


def watched(pairs: Pairs, folder: Path, overlap: bool = True) -> tuple[Opened, SpannedCuda]:
    cuda = HostCuda()
    spanned = SpannedCuda(cuda)
    return Opened(pairs.bundle.files.root, folder, overlap=overlap, cuda=cuda, watched=spanned), spanned


@pytest.fixture(scope="module")
def report() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("gpu_report", ROOT / "benchmarks" / "gpu_report.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules["gpu_report"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["gpu_report"]


def test_spans_say_when_what_ran(pairs: Pairs, tmp_path: Path) -> None:
    opened, cuda = watched(pairs, tmp_path / "bundle")
    expected = pairs.bundle.generate(PROMPTS[0], **OPTIONS).tokens
    opened.bundle.generate(PROMPTS[0], **OPTIONS)
    cuda.spans()
    watch = HostSpans(device=True)
    found = opened.bundle.with_observer(watch).generate(PROMPTS[0], **OPTIONS)
    host, spans = watch.spans, cuda.spans()
    assert found.tokens == expected  # watching changes nothing
    assert {span.lane for span in spans} == {"target", "draft", "copy"}
    assert all(span.end >= span.start for span in (*host, *spans))
    rounds = found.stats.rounds
    kinds = ("propose", "fill", "launch", "wait", "commit", BESIDE)
    assert {kind: sum(span.what == kind for span in host) for kind in kinds} == dict.fromkeys(kinds, rounds)
    waits, fills = ([span for span in host if span.what == what] for what in ("wait", "fill"))
    passes = [s for s in spans if (s.lane, s.what) == ("target", "pass") and s.start > fills[0].start]
    inside = [
        [fill.end <= ran.start and ran.end <= wait.end for ran in passes]
        for fill, wait in zip(fills, waits, strict=True)
    ]
    assert np.array(inside).any(axis=1).all() and np.array(inside).sum() == len(passes)
    besides = [span for span in host if span.what == BESIDE]
    for fill, text, wait in zip(fills[1:], besides, waits[1:], strict=False):
        assert fill.end <= text.start and text.end <= wait.start  # the round before is settled beside the pass


def test_the_picture_shows_every_lane(pairs: Pairs, tmp_path: Path) -> None:
    opened, cuda = watched(pairs, tmp_path / "bundle")
    host = HostSpans(device=True)
    opened.bundle.with_observer(host).generate(PROMPTS[0], **OPTIONS)
    spans = last_rounds([*host.spans, *cuda.spans()], 4)
    assert sum(span.what == "propose" for span in spans) == 4
    draw_timeline(spans, tmp_path / "picture.png", "four rounds")
    seen = {tuple(pixel) for pixel in (imread(tmp_path / "picture.png")[..., :3].reshape(-1, 3) * 255).astype(int)}
    for colour in ("#dd8452", "#4c72b0", "#e6e6e6"):  # a pass, proposing, waiting
        assert tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5)) in seen
    with pytest.raises(ValueError, match="no round was recorded"):
        draw_timeline([], tmp_path / "nothing.png", "nothing")


def test_time_of_the_host_leaves_out_waiting() -> None:
    two = [("propose", 0, 10), ("fill", 10, 30), ("launch", 30, 35), (BESIDE, 35, 50), ("wait", 50, 900)]
    spans = [Span(HOST, what, (at + start) * 1e-6, (at + end) * 1e-6) for at in (0, 1000) for what, start, end in two]
    spans.append(Span("target", "pass", 0, 1))
    assert np.allclose(host_microseconds(spans), (50, 15))


def test_overlapped_and_serial_are_compared(
    pairs: Pairs, tmp_path: Path, report: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def on_device(name: str, options: Any, overlap: bool, watched: bool) -> tuple[Any, SpannedCuda]:
        folder = tmp_path / f"{overlap}{watched}"
        cuda = HostCuda()
        spanned = SpannedCuda(cuda)
        opened = Opened(
            pairs.bundle.files.root, folder, overlap=overlap, cuda=cuda, watched=spanned if watched else None
        )
        assert opened.bundle.engine("target").open(opened.bundle.engine("target").allocate(1, 64)).overlaps == overlap
        return opened.bundle, spanned

    monkeypatch.setattr(report, "on_device", on_device)
    options = argparse.Namespace(out=tmp_path, tokens=16, device=0, bundle=pairs.bundle.files.root)
    figures = report.overlapped_and_serial("tensorrt", options, PROMPTS[0])
    assert sorted(figures) == [
        f"tokens_per_second_{how}_{mode}" for how in ("overlapped", "serial") for mode in ("auto", "ngram")
    ]
    assert all(value > 0 for value in figures.values())
    assert len(report.overlap_lines(figures)) == 2 and report.overlap_lines({}) == []
    for picture in ("timeline-tensorrt.png", "timeline-tensorrt-serial.png"):
        assert (tmp_path / picture).stat().st_size > 5000
