"""Observers hear every round in order, and change nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dspark_runtime.decoding.observer import Observer
from dspark_runtime.decoding.round import Accepted, Flight
from dspark_runtime.decoding.sequence import Chunk
from dspark_runtime.drafters.ngram import NgramDrafter
from tests.runtime.conftest import Tiny

PROMPTS = [[5, 6, 7, 8, 9] * 3, [10, 11], [33] * 9]


class Listening(Observer):
    def __init__(self) -> None:
        self.heard: list[str] = []
        self.tokens: dict[int, list[int]] = {}
        self.flights: list[Flight] = []

    def started(self, flight: Flight) -> None:
        self.heard.append("started")
        self.flights.append(flight)

    def committed(self, accepted: Accepted, flight: Flight) -> None:
        self.heard.append("committed")
        assert flight is self.flights[-1]
        logits = flight.buffers.logits[accepted.row, : len(accepted.tree)]
        assert list(accepted.verdict.tokens) == logits[list(accepted.verdict.path)].argmax(-1).tolist()
        self.tokens.setdefault(accepted.sequence.index, []).extend(accepted.tokens)

    def finished(self, flight: Flight) -> None:
        self.heard.append("finished")

    def settled(self, chunks: Sequence[Chunk], began: float, ended: float) -> None:
        self.heard.append(f"settled {len(chunks)}")
        assert began <= ended


def test_every_round_is_heard_in_order_and_the_text_stays(tiny: Tiny) -> None:
    expected = tiny.tokens(PROMPTS, [NgramDrafter()], tokens=20, eos=[7])
    watch = Listening()
    found = tiny.generate(PROMPTS, [NgramDrafter()], tokens=20, eos=[7], observer=watch)
    assert [generation.tokens for generation in found] == expected
    for index, generation in enumerate(found):  # the first token comes from the prompt
        assert watch.tokens.get(index, []) == generation.tokens[1:]
    rounds = [len(flight.trees) for flight in watch.flights]
    assert watch.heard == [word for n in rounds for word in ("started", *["committed"] * n, "finished", f"settled {n}")]
    for flight in watch.flights:
        times = (flight.began, flight.drafted, flight.filled, flight.started)
        times += (flight.waited, flight.verified, flight.committed)
        assert np.all(np.diff(times) >= 0)


def test_shipped_code_patches_nothing() -> None:
    root = Path(__file__).parents[3]
    for folder in ("dspark_export", "runtime"):
        for path in (root / folder).rglob("*.py"):
            assert "unittest.mock" not in path.read_text(encoding="utf-8"), path
