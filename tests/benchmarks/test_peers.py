"""The comparison with other programs: how runs are timed, ordered and compared. No other program is needed."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import pytest
from rich.console import Console

from benchmarks.peers import llama_cpp_peer, own
from benchmarks.peers.__main__ import load_all, measuring
from benchmarks.peers.apart import ApartPeer, Crashed
from benchmarks.peers.measure import geometric_mean, measure, own_results, ratios, shared_prefix
from benchmarks.peers.models import SharedModel
from benchmarks.peers.protocol import Candidate, Missing, Peer, Stopwatch, Timed
from benchmarks.peers.report import Conditions, draw, print_report, to_json
from benchmarks.peers.requantized import KINDS, requantize
from dspark_export.bench.bandwidth import Bandwidth
from dspark_runtime.processors import this_machine


class FakePeer:
    """Pretends to decode at a fixed speed, after a second of prefill, and notes that it was called."""

    def __init__(self, name: str, speed: float, calls: list[str], tokens: Sequence[int] = range(5)) -> None:
        self.name, self.precision, self.family = name, "fp32", "fp32"
        self.setting: str | None = None
        self._speed, self._calls, self._tokens = speed, calls, tuple(tokens)

    def generate(self, prompt: Sequence[int], max_new_tokens: int) -> Timed:
        self._calls.append(self.name)
        return Timed(self._tokens, 1, 1.0, 1.0 + (len(self._tokens) - 1) / self._speed)


def fake_own(name: str, speed: float, calls: list[str]) -> FakePeer:
    """The same, as this project."""
    peer = FakePeer(name, speed, calls)
    peer.setting = own.PLAIN_EXACT
    return peer


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
    results, crashed = measure(peers, [[1], [2]], max_new_tokens=5, repeats=2)
    assert not crashed
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab" + "abc"  # the first three warm up
    assert [len(runs) for result in results for runs in result.runs] == [2] * 6


def test_ratios_are_taken_per_prompt() -> None:
    calls: list[str] = []
    (mine, other), _ = measure(
        [FakePeer("m", 30.0, calls), FakePeer("o", 10.0, calls)], [[1]], max_new_tokens=5, repeats=3
    )
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


def candidates(model: SharedModel, threads: int) -> Iterator[Candidate]:
    """Peers that end in every way, for :mod:`benchmarks.peers.apart`, which imports this module to load them."""

    class Ending(FakePeer):
        def generate(self, prompt: Sequence[int], max_new_tokens: int) -> Timed:
            if prompt == [2]:
                ENDS[self.name]()
            return super().generate(prompt, max_new_tokens)

    def missing() -> Peer:
        raise Missing("install it")

    for name in ENDS:
        yield Candidate(name, partial(Ending, name, 10.0, []))
    yield Candidate("gone", missing)
    yield Candidate("ends at once", lambda: sys.exit(3))


def fail() -> None:
    raise ValueError("no such token")


ENDS: dict[str, Callable[[], object]] = {
    "good": lambda: None,
    "killed": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "failed": fail,
    "hangs": lambda: time.sleep(600),
}


def test_a_peer_that_crashes_is_reported_and_the_rest_go_on(tmp_path: Path) -> None:
    model = SharedModel("model", tmp_path)

    def opened(name: str) -> ApartPeer:
        return ApartPeer(__name__, name, model, 1, seconds=5.0 if name == "hangs" else 120.0)

    with pytest.raises(Missing, match="install it"):
        opened("gone")
    with pytest.raises(Crashed, match="ended with exit code 3 while loading"):
        opened("ends at once")
    peers = [opened(name) for name in ("killed", "good", "failed")]
    try:
        results, crashed = measure(peers, [[1], [2], [3]], max_new_tokens=5, repeats=2)
    finally:
        for peer in peers:
            peer.close()
    assert [result.peer.name for result in results] == ["good"]
    assert [len(runs) for runs in results[0].runs] == [2, 2, 2]
    assert crashed == {
        "killed": "ended by SIGSEGV while generating",
        "failed": "failed while generating: ValueError: no such token",
    }


def test_a_peer_that_hangs_is_ended(tmp_path: Path) -> None:
    peer = ApartPeer(__name__, "hangs", SharedModel("model", tmp_path), 1)
    peer._seconds = 0.5
    with pytest.raises(Crashed, match="no answer within 0 s while generating"):
        peer.generate([2], 5)
    peer.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_gguf_file_in_another_type_has_the_same_numbers(kind: str, tmp_path: Path) -> None:
    source, target = tmp_path / "source.gguf", tmp_path / "target.gguf"
    values = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
    writer = gguf.GGUFWriter(source, "llama")
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    writer.add_float32("llama.rope.freq_base", 5e5)
    writer.add_tensor("token_embd.weight", values)
    writer.add_tensor("output_norm.weight", values[0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    requantize(source, target, kind)
    reader = gguf.GGUFReader(target)
    assert reader.fields["tokenizer.ggml.tokens"].contents() == ["a", "b"]
    assert reader.fields["llama.rope.freq_base"].contents() == 5e5
    found = {t.name: t for t in reader.tensors}
    assert found["token_embd.weight"].tensor_type.name == kind
    back = gguf.quants.dequantize(found["token_embd.weight"].data, found["token_embd.weight"].tensor_type)
    np.testing.assert_allclose(
        back, values, rtol=0, atol={"F32": 0, "F16": 2e-3, "BF16": 2e-2, "Q8_0": 2e-2}.get(kind, 0.5)
    )
    assert np.array_equal(found["output_norm.weight"].data, values[0])


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
    mine, other = fake_own("dspark fp32", 20.0, calls), FakePeer("other", 10.0, calls, [0, 1, 9, 9, 9])
    faster = fake_own("dspark w8a8", 30.0, calls)
    faster.family = "w8a8"
    results, _ = measure([mine, other, faster], [[1], [2]], max_new_tokens=5, repeats=1)
    assert set(own_results(results, "fp32")) == {own.PLAIN_EXACT} and own_results(results, "int4") == {}
    conditions = Conditions(
        model="model",
        machine=this_machine(),
        threads=1,
        bandwidth=Bandwidth(2e10, 1e10),
        weight_bytes={"fp32": 500_000_000},
        products=2.5e10,
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
    assert "a token has 125 M: rows of a pass cannot exceed 200 a second" in text
    assert "2.00" in text and "3.00" in text and "4/10" in text and "left out: gone: install it" in text
    draw(conditions, results, tmp_path / "peers.png")
    assert (tmp_path / "peers.png").stat().st_size > 1000
