"""This project, plain and speculating, with and without ``exact``, on a bundle of each CPU precision."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache, partial
from pathlib import Path

from benchmarks.peers.models import SharedModel
from benchmarks.peers.protocol import Candidate, Stopwatch, Timed
from dspark_runtime import Bundle
from dspark_runtime.bundle.precisions import HALF, PRECISIONS

MEASURED = tuple(name for name in PRECISIONS if name not in HALF and not PRECISIONS[name].kept)
"""Precisions that differ on a CPU: half-precision weights are widened when they are loaded."""
PLAIN_EXACT = "plain, exact"
SETTINGS = (PLAIN_EXACT, "plain, not exact", "speculating, exact", "speculating, not exact")


class OwnPeer:
    """One bundle in one setting. The schedule learns over the prompts of the run, as in everyday use."""

    def __init__(self, bundle: Bundle, precision: str, setting: str) -> None:
        self.name = f"dspark {precision}, {setting}"
        self.precision = self.family = precision
        self.setting = setting
        self._bundle = bundle.with_fresh_schedule()
        self._mode = "auto" if setting.startswith("speculating") else "off"

    def generate(self, prompt: Sequence[int], max_new_tokens: int) -> Timed:
        """Streamed; turning tokens into text is part of the time."""
        watch = Stopwatch()
        stream = self._bundle.generate(
            list(prompt), max_new_tokens=max_new_tokens, speculate=self._mode, ignore_eos=True, stream=True
        )
        for chunk in stream:
            watch.arrived(chunk.tokens)
        return watch.result()


def candidates(model: SharedModel, threads: int) -> Iterator[Candidate]:
    """Every such precision in every setting."""

    @cache
    def opened(path: Path, exact: bool) -> Bundle:
        return Bundle.open(path, threads=threads, exact=exact)

    def load(precision: str, setting: str) -> OwnPeer:
        return OwnPeer(opened(model.bundle(precision), not setting.endswith("not exact")), precision, setting)

    for precision in MEASURED:
        for setting in SETTINGS:
            yield Candidate(f"dspark {precision}, {setting}", partial(load, precision, setting))
