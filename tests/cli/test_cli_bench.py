"""bench: what it measures, what it prints, and the sets that come with it."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from rich.console import Console

from dspark_export.bench import bandwidth
from dspark_export.bench.bandwidth import bytes_per_token, measure_bandwidth
from dspark_export.bench.plot import draw
from dspark_export.bench.report import _drafters_table, over_all_sets, shown_summaries
from dspark_export.bench.runner import (
    ALL_SETS,
    BenchResult,
    Measured,
    _rotated,
    _summary,
    checked_modes,
    modes_of,
    run,
)
from dspark_export.prompts.sets import SHIPPED, PromptItem, load_sets
from dspark_export.prompts.texts import first_difference
from dspark_runtime import SPECULATION_MODES, Bundle, Generation
from dspark_runtime.decoding.statistics import DrafterCounts, Statistics
from dspark_runtime.errors import UsageError
from dspark_runtime.processors import this_machine
from tests.cli.conftest import Invoke

PROMPTS = ["one two one two", "red blue red", "a b c a b"]
OPTIONS = ("--max-new-tokens", 12, "--repeats", 2, "--threads", 1)


@pytest.fixture(autouse=True)
def small_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "_BYTES", 8 << 20)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps({"turns": [text]}) + "\n" for text in PROMPTS))
    return path


def test_json_and_plot(bundle: Path, invoke: Invoke, prompts: Path, tmp_path: Path) -> None:
    picture = tmp_path / "ratios.png"
    (tmp_path / "other.txt").write_text("x y x y\n")
    sets = ("--prompts", prompts, "-p", tmp_path / "other.txt")
    result = invoke("bench", bundle, *sets, *OPTIONS, "--modes", "ngram,self-draft", "--json", "--plot", picture)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    found = json.loads(result.stdout)
    assert found["tokens_equal"] is True and found["divergences"] == []
    assert (found["threads"], found["repeats"], found["precision"]) == (1, 2, "fp32")
    assert found["bandwidth"]["read"] > 1e8 and found["bandwidth"]["triad"] > 1e8
    limit = found["bandwidth"]["read"] / found["weight_bytes_per_token"]
    assert found["plain_limit_tokens_per_second"] == pytest.approx(limit)
    keys = [(s["set"], s["mode"]) for s in found["summaries"]]
    assert keys == [(name, mode) for name in ("mine", "other", "all") for mode in ("off", "ngram", "self-draft")]
    for summary in found["summaries"]:
        assert summary["equal"] == summary["prompts"] == {"mine": 3, "other": 1, "all": 4}[summary["set"]]
        assert summary["draft_share"] + summary["verify_share"] + summary["host_share"] == pytest.approx(1.0)
        assert summary["worst_ratio"] <= summary["ratio"] * (1 + 1e-9)
        assert summary["tokens_per_second"] > 0 and summary["prefill_tokens_per_second"] > 0
        if summary["mode"] == "off":
            assert summary["ratio"] == pytest.approx(1.0) and summary["accepted_length"] == pytest.approx(1.0)
        assert set(summary["drafters"]) <= {summary["mode"]}
        for drafter in summary["drafters"].values():
            depths = [drafter[key] for key in ("verified", "conditional_acceptance", "prefix_survival")]
            assert len({len(figures) for figures in depths}) == 1 and depths[0]
            assert depths[0] == sorted(depths[0], reverse=True)
            assert depths[1][0] == depths[2][0] and drafter["accepted"] <= drafter["drafted"]
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_acceptance_by_depth(tmp_path: Path) -> None:
    stats = [Statistics(), Statistics()]
    for one, accepted in zip(stats, (2, 0), strict=True):
        counts = one.per_drafter.setdefault("dspark", DrafterCounts(drafted=3, accepted=accepted))
        counts.count_chain(3, accepted, [0.9, 0.5, 0.5])
    measured = [Measured(generations=[Generation("", [], "length", 4, one)]) for one in stats]
    summary = _summary("set", "dspark", measured, measured, 0)
    drafter = summary.drafters["dspark"]
    assert (drafter.drafted, drafter.accepted, drafter.verified) == (6, 2, [2, 2, 2])
    assert drafter.conditional_acceptance == [0.5, 1.0, 0.0] and drafter.prefix_survival == [0.5, 0.5, 0.0]
    assert drafter.calibration_error == pytest.approx((0.8 + 0.1 + 0.45) / 6)  # 0.9: 1 of 2; 0.45: 1 of 2; 0.225: none
    result = BenchResult([replace(summary, set=name) for name in ("set", ALL_SETS)], [])
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(_drafters_table(over_all_sets(result)))
    assert "2/6" in (text := console.export_text()) and "0.50/0.50  1.00/0.50  0.00/0.00" in text
    draw(shown_summaries(result), over_all_sets(result), tmp_path / "bench.svg", "title")
    assert "depth of the draft" in (tmp_path / "bench.svg").read_text()


def test_table(bundle: Path, invoke: Invoke, prompts: Path) -> None:
    result = invoke("bench", bundle, "-p", prompts, *OPTIONS, "--modes", "ngram", "--limit", 2)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert any(line.split()[:2] == ["mine", "plain"] for line in lines)
    assert any(line.split()[0] == "ngram" and line.endswith("2/2") for line in map(str.rstrip, lines) if line.strip())
    for text in ("accepted", "Prefill", "GB/s", "limit is"):
        assert text in result.stdout
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--modes", "off,magic"], "'magic' is unknown"),
        (["--prompts", "nowhere.jsonl"], "no such file, and no shipped set"),
        (["--repeats", "0"], "0 repeats"),
        (["--limit", "0"], "--limit"),
        (["--plot", "picture.doc"], ".png"),
        (["--plot", "/no/such/folder/picture.png"], "no folder"),
        (["--max-new-tokens", "0"], "max_new_tokens"),
    ],
)
def test_wrong_options(bundle: Path, invoke: Invoke, prompts: Path, arguments: list[str], message: str) -> None:
    result = invoke("bench", bundle, "-p", prompts, "--modes", "off", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr and result.stdout == ""


def test_no_bundle(tmp_path: Path, invoke: Invoke) -> None:
    assert invoke("bench", tmp_path).exit_code == 7


def test_a_text_that_differs_is_found(opened: Bundle, prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Bundle.generate

    def wrong(self: Bundle, prompt: object, **options: object) -> object:
        generation = original(self, prompt, **options)  # type: ignore[arg-type]
        if options["speculate"] == "ngram" and len(generation.tokens) > 5:
            generation.tokens[5] += 1
        return generation

    monkeypatch.setattr(Bundle, "generate", wrong)
    items = load_sets([str(prompts)])
    result = run(opened, items, ["off", "ngram"], max_new_tokens=12, repeats=1)
    assert [(d.mode, d.prompt, d.position) for d in result.divergences] == [("ngram", i, 5) for i in range(3)]
    assert all(d.token == d.plain_token + 1 for d in result.divergences)  # type: ignore[operator]
    assert [s.equal for s in result.summaries if s.mode == "ngram"] == [0, 0]


def test_what_a_mode_learned_stays_with_it(opened: Bundle) -> None:
    fresh = opened.with_fresh_schedule()
    assert fresh.schedule is not opened.schedule
    assert fresh.schedule.costs is not opened.schedule.costs
    assert fresh.target is opened.target
    before = fresh.schedule.costs.ms(1)
    opened.schedule.costs.observe(1, 1e4, plain=True)
    assert fresh.schedule.costs.ms(1) == before


def test_modes(opened: Bundle) -> None:
    assert modes_of(opened)[0] == "off" and set(modes_of(opened)) == set(SPECULATION_MODES)
    assert checked_modes(["ngram", "off", "ngram"], opened) == ["off", "ngram"]
    assert checked_modes(["ngram+store"], opened) == ["off", "ngram+store"]
    for wrong in ("", "ngram+ngram", "ngram+off", "auto+store", "ngram+magic", "+"):
        with pytest.raises(UsageError, match="unknown"):
            checked_modes([wrong], opened)


@pytest.mark.parametrize("history", [True, False])
def test_what_prompts_tell_each_other(opened: Bundle, history: bool) -> None:
    """The same prompt again is known the second time; in the next repeat it is new again."""
    items = [PromptItem("first", "one two three"), PromptItem("second", "one two three")]
    result = run(opened, items, ["off", "store"], max_new_tokens=60, repeats=2, history=history)
    first, second = (s.rounds for s in result.summaries if s.mode == "store" and s.set != "all")
    assert (second < 0.6 * first) == history
    assert result.summaries[-1].equal == 2


def test_every_mode_comes_first_in_turn() -> None:
    modes = ["off", "ngram", "auto"]
    assert [_rotated(modes, turn)[0] for turn in range(6)] == modes * 2
    assert all(sorted(_rotated(modes, turn)) == sorted(modes) for turn in range(6))


def test_first_difference() -> None:
    assert first_difference([1, 2], [1, 2]) is None
    assert first_difference([1, 2], [1, 3, 4]) == 1
    assert first_difference([1, 2], [1, 2, 3]) == 2


def test_weight_bytes_are_those_of_the_file(opened: Bundle) -> None:
    files = opened.files
    graph = files.graph("target", prefer=("onnxruntime-cpu",))
    model = onnx.load(files.path(graph.file))
    tables = {n.input[0] for n in model.graph.node if n.op_type == "Gather"}
    used = {name for n in model.graph.node if n.op_type != "Gather" for name in n.input}
    expected = sum(
        onnx.numpy_helper.to_array(tensor).nbytes
        for tensor in model.graph.initializer
        if tensor.name in used or tensor.name not in tables
    )
    assert bytes_per_token(files) == pytest.approx(expected, rel=0.01)


def test_bandwidth_and_machine() -> None:
    found = measure_bandwidth(2)
    assert np.isfinite([found.read, found.triad]).all() and found.read > 1e8 and found.triad > 1e8
    machine = this_machine()
    assert 1 <= machine.physical_cores <= machine.logical_cores and machine.cpu


def test_shipped_sets() -> None:
    items = load_sets(list(SHIPPED))
    texts = [item.text for item in items]
    assert len(set(texts)) == len(texts)
    for name in SHIPPED:
        assert sum(item.set == name for item in items) >= 12
        assert len(load_sets([name], limit=2)) == 2
    for item in items:
        if item.set == "repeat":
            assert 80 <= len(item.text.split()) <= 220
