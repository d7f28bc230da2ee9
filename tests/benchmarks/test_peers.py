"""The comparison with other programs: how runs are timed, ordered and compared. No other program is needed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.peers import llama_cpp_peer, own
from benchmarks.peers.__main__ import load_all, measuring
from benchmarks.peers.measure import geometric_mean, measure, own_results, ratios, shared_prefix
from benchmarks.peers.models import SharedModel
from benchmarks.peers.protocol import Candidate, Missing, Peer, Stopwatch, Timed
from benchmarks.peers.report import Conditions, draw, print_report, to_json
from dspark_export.bench.bandwidth import Bandwidth
from dspark_runtime.processors import this_machine


class FakePeer:
    """Pretends to decode at a fixed speed, after a second of prefill, and notes that it was called."""

    def __init__(self, name: str, speed: float, calls: list[str], tokens: Sequence[int] = range(5)) -> None:
        self.name, self.precision, self.family = name, "fp32", "fp32"
        self._speed, self._calls, self._tokens = speed, calls, tuple(tokens)

    def generate(self, prompt: Sequence[int], max_new_tokens: int) -> Timed:
        self._calls.append(self.name)
        return Timed(self._tokens, 1, 1.0, 1.0 + (len(self._tokens) - 1) / self._speed)


class FakeOwn(FakePeer, own.OwnPeer):
    """The same, as this project."""

    setting = own.PLAIN_EXACT


def test_decode_speed_excludes_what_came_first() -> None:
    assert Timed((1, 2, 3, 4), 1, 2.0, 3.5).decode_speed == pytest.approx(2.0)
    assert Timed((1, 2, 3, 4), 2, 2.0, 3.0).decode_speed == pytest.approx(2.0)
    assert Timed((1,), 1, 2.0, 2.0).decode_speed is None
    assert Timed((1, 2), 1, 1.0, 4.0).total_speed == pytest.approx(0.5)


def test_the_stopwatch_notes_the_first_delivery() -> None:
    watch = Stopwatch()
    watch.arrived([7, 8])
    watch.arrived([9])
    result = watch.result()
    assert result.tokens == (7, 8, 9) and result.first == 2
    assert 0 < result.prefill <= result.seconds and watch.count == 3


def test_progress_is_lines_on_stderr_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    load_all([Candidate(name, lambda: FakePeer("a", 10.0, [])) for name in ("one", "two")])
    with measuring(60) as step:
        for _ in range(60):
            step()
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert lines[:2] == ["loading 1 of 2: one", "loading 2 of 2: two"]
    assert len(lines) == 22 and lines[-1] == "measured 60 of 60 runs"


def test_peers_take_turns_and_another_begins_each_time() -> None:
    calls: list[str] = []
    peers: list[Peer] = [FakePeer(name, 10.0, calls) for name in "abc"]
    results = measure(peers, [[1], [2]], max_new_tokens=5, repeats=2)
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab" + "abc"  # the first three warm up
    assert [len(runs) for result in results for runs in result.runs] == [2] * 6


def test_ratios_are_taken_per_prompt() -> None:
    calls: list[str] = []
    mine, other = measure([FakePeer("m", 30.0, calls), FakePeer("o", 10.0, calls)], [[1]], max_new_tokens=5, repeats=3)
    assert ratios(mine, other) == pytest.approx([3.0])
    assert geometric_mean([2.0, 8.0, None]) == pytest.approx(4.0)
    assert geometric_mean([None]) is None
    assert shared_prefix([1, 2, 3], [1, 2, 4]) == 2 and shared_prefix([1], [1, 2]) == 1


def test_a_peer_that_is_missing_is_named_with_its_reason() -> None:
    def fail() -> Peer:
        raise Missing("install it")

    there = FakePeer("there", 1.0, [])
    peers, missing = load_all([Candidate("gone", fail), Candidate("there", lambda: there)])
    assert peers == [there] and missing == {"gone": "install it"}


def test_a_folder_gives_llama_cpp_nothing_to_run(tmp_path: Path) -> None:
    (candidate,) = llama_cpp_peer.candidates(SharedModel(str(tmp_path), tmp_path / "out"), threads=1)
    with pytest.raises(Missing, match="convert_hf_to_gguf"):
        candidate.load()


def test_a_failed_conversion_leaves_nothing(tmp_path: Path) -> None:
    model = SharedModel(str(tmp_path / "nothing"), tmp_path / "out")
    with pytest.raises(Missing, match="failed"):
        model.bundle("fp32")
    assert list((tmp_path / "out").iterdir()) == []


def test_the_report_compares_each_family_with_its_own_bundle(tmp_path: Path) -> None:
    calls: list[str] = []
    mine, other = FakeOwn("dspark fp32", 20.0, calls), FakePeer("other", 10.0, calls, [0, 1, 9, 9, 9])
    faster = FakeOwn("dspark w8a8", 30.0, calls)
    faster.family = "w8a8"
    results = measure([mine, other, faster], [[1], [2]], max_new_tokens=5, repeats=1)
    assert set(own_results(results, "fp32")) == {own.PLAIN_EXACT} and own_results(results, "int4") == {}
    conditions = Conditions(
        model="model",
        machine=this_machine(),
        threads=1,
        bandwidth=Bandwidth(2e10, 1e10),
        weight_bytes={"fp32": 500_000_000},
        prompts=["chat", "code"],
        prompt_tokens=[1, 1],
        max_new_tokens=5,
        repeats=1,
    )
    data = json.loads(json.dumps(to_json(conditions, results, {"gone": "install it"})))
    assert data["peers"][1]["dspark_ratio"] == {own.PLAIN_EXACT: pytest.approx(2.0)}
    assert data["peers"][0]["dspark_ratio"] == {} and data["peers"][0]["dspark_fastest"] is None
    assert data["peers"][1]["dspark_fastest"]["name"] == "dspark w8a8"
    assert data["peers"][1]["dspark_fastest"]["by_prompt"] == pytest.approx([3.0, 3.0])
    assert data["peers"][1]["agrees_with_dspark_for_tokens"] == [2, 2]
    assert data["plain_limit_tokens_per_second"] == {"fp32": pytest.approx(40.0)}
    console = Console(width=120, record=True)
    print_report(console, conditions, results, {"gone": "install it"})
    text = console.export_text()
    assert "2.00" in text and "3.00" in text and "4/10" in text and "left out: gone: install it" in text
    draw(conditions, results, tmp_path / "peers.png")
    assert (tmp_path / "peers.png").stat().st_size > 1000
