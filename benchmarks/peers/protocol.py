"""What a peer is: a program that continues token ids greedily, and how one such run is timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

REQUIREMENTS = "pip install -r benchmarks/peers/requirements.txt"


@dataclass(frozen=True)
class Timed:
    """One run. ``tokens`` are the new ones; ``first`` of them came together, ``prefill`` seconds after the start.

    ``seconds`` is the time from the start to the last token.
    """

    tokens: tuple[int, ...]
    first: int
    prefill: float
    seconds: float

    @property
    def decode_speed(self) -> float | None:
        """Tokens per second from the first token to the last; None where everything came at once."""
        spent = self.seconds - self.prefill
        return (len(self.tokens) - self.first) / spent if len(self.tokens) > self.first and spent > 0 else None

    @property
    def total_speed(self) -> float:
        """New tokens per second, prefill included."""
        return len(self.tokens) / self.seconds


class Stopwatch:
    """Notes when tokens arrive; starts when it is made."""

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._first = 0
        self._began = time.perf_counter()
        self._prefill = self._last = 0.0

    def arrived(self, tokens: Iterable[int]) -> None:
        """These tokens are there now."""
        self._last = time.perf_counter() - self._began
        self._tokens += tokens
        if not self._first:
            self._first, self._prefill = len(self._tokens), self._last

    @property
    def count(self) -> int:
        """Tokens so far."""
        return len(self._tokens)

    def result(self) -> Timed:
        """The run, after its last token."""
        return Timed(tuple(self._tokens), self._first, self._prefill, self._last)


class Peer(Protocol):
    """One program in one setting, loaded and ready.

    ``precision`` names its weights; ``family`` the bundle of this project it is compared with (fp32, int8 or int4).
    ``setting`` is that of this project's own peers, None for other programs.
    """

    name: str
    precision: str
    family: str

    @property
    def setting(self) -> str | None:
        """See the class."""

    def generate(self, prompt: Sequence[int], max_new_tokens: int) -> Timed:
        """Continue ``prompt`` greedily by that many tokens, past any end-of-text token."""
        ...


@dataclass(frozen=True)
class Candidate:
    """A peer that can be loaded: ``load`` raises Missing where it cannot."""

    name: str
    load: Callable[[], Peer]


class Missing(Exception):
    """A peer cannot take part; the message says why and what to do."""


def missing_package(name: str) -> Missing:
    """The package ``name`` is not installed."""
    return Missing(f"{name} is not installed; {REQUIREMENTS}")
