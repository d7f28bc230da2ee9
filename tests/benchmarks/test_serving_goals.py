"""The checks of what a service promises: they run, and they notice what is broken."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.serving import goals
from dspark_runtime.decoding.loop import DecodingLoop
from dspark_runtime.decoding.sequence import SequenceState
from tests.shared.bundles import built_llama


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built_llama(tmp_path_factory.mktemp("goals"))


def run(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> tuple[int, list[dict[str, Any]]]:
    """Exit code and findings."""
    prompts, found = tmp_path / "prompts.txt", tmp_path / "found.json"
    prompts.write_text("".join(f"{number} one two one two three one two {number}\n" for number in range(9)))
    sizes = ["--prompts", "9", "--concurrency", "1,3", "--requests", "6", "--draft-length", "2", "--long", "40"]
    sizes += ["--turns", "1", "--cancels", "5", "--memory-requests", "80", "--max-new-tokens", "8"]
    line = ["goals", str(bundle), "--threads", "1", "--sets", str(prompts), "--json", str(found), *sizes, *more]
    monkeypatch.setattr(sys, "argv", line)
    code = goals.main()
    return code, json.loads(found.read_text())["findings"]


def test_all_checks(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, found = run(bundle, tmp_path, monkeypatch, "--modes", "off,ngram")
    assert [finding["check"] for finding in found] == sorted(
        (finding["check"] for finding in found), key=list(goals.CHECKS).index
    )
    assert {finding["check"] for finding in found} == set(goals.CHECKS)
    counted = [finding for finding in found if finding["most"] in (0, 1)]  # all goals but those about time and memory
    assert all(finding["met"] for finding in counted), counted
    assert {finding["check"] for finding in counted} == {"texts", "cancel", "memory"}
    assert sum("other texts, of 9" in finding["what"] for finding in found) >= 4
    (fixed,) = [finding for finding in found if finding["what"].startswith("ngram, 2 drafts: tokens a round")]
    assert fixed["value"] == pytest.approx(1)


def test_other_texts_are_noticed(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verdict = DecodingLoop._verdict

    def wrong_beside_others(self: DecodingLoop, sequence: Any, proposal: Any, tree: Any, logits: Any) -> Any:
        return verdict(self, sequence, proposal, tree, np.roll(logits, self.running - 1, axis=-1))

    monkeypatch.setattr(DecodingLoop, "_verdict", wrong_beside_others)
    code, found = run(bundle, tmp_path, monkeypatch, "--modes", "off", "--checks", "texts")
    assert code == 1
    assert {finding["what"].split(":")[0] for finding in found if not finding["met"]} == {"off, 3 clients"}


def test_a_late_cancellation_is_noticed(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cancel, step = DecodingLoop.cancel, DecodingLoop.step

    def late(self: DecodingLoop, sequence: SequenceState) -> Any:
        for _ in range(4):
            step(self, rounds_first=True)
        return cancel(self, sequence)

    monkeypatch.setattr(DecodingLoop, "cancel", late)
    code, found = run(bundle, tmp_path, monkeypatch, "--modes", "off", "--checks", "cancel")
    assert code == 1 and found[0]["value"] > 1
