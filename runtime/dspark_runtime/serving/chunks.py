"""How many tokens of prompts are computed between two rounds.

A chunk of n tokens takes ``a + b n``: its weights are read however few tokens there are, so that small chunks make a
prompt slow. While others run, a turn of prompts has so many tokens that ``b n`` is what it costs beside them: ``a`` and
the round that follows. A prompt then takes about twice as long as alone. Where more requests wait for their first
token than run, turns are as long as they may be: rounds of a few sequences would keep many from joining them, although
a round takes nearly as long with more.
"""

from __future__ import annotations

FEWEST = 16
_MEMORY = 0.1  # weight of the newest measurement


class ChunkSize:
    """Learns what prompt tokens and rounds take.

    Args:
        most: tokens of a turn while other requests run.
        alone: tokens of a chunk while nothing else runs.
        share: how much of the time prompts may take, 1 for as much as the rounds.
        fixed: every chunk has ``most`` tokens.
    """

    def __init__(self, most: int, alone: int, share: float = 1.0, fixed: bool = False) -> None:
        self._most, self._alone, self._share = min(most, alone), alone, share
        self.fixed = fixed
        self._chunks = Line()
        self._round_s = 0.0

    def tokens(self, running: int, prompts: int = 1) -> int:
        """Tokens of the next turn, while ``running`` requests wait for it and ``prompts`` are on their way."""
        if self.fixed:
            return self._most
        if not running:
            return self._alone
        if prompts > running or not self._chunks.known or not self._round_s:
            return self._most
        start, token = self._chunks.start_and_slope(self._round_s)
        turn = start + self._share * self._round_s
        return max(min(int(turn / token), self._most), min(FEWEST, self._most))

    def observe(self, prompt_tokens: int, seconds: float) -> None:
        """A step took this long; it computed this much of a prompt, or was a round if that is 0."""
        if prompt_tokens:
            self._chunks.observe(prompt_tokens, seconds)
        else:
            self._round_s = seconds if not self._round_s else self._round_s + _MEMORY * (seconds - self._round_s)


class Line:
    """A straight line through points that come one by one; older ones count less. Goes up, and begins at 0 or above."""

    def __init__(self) -> None:
        self._x = self._y = self._xx = self._xy = 0.0
        self.known = False

    def observe(self, x: float, y: float) -> None:
        """One point."""
        weight = _MEMORY if self.known else 1.0
        self._x += weight * (x - self._x)
        self._y += weight * (y - self._y)
        self._xx += weight * (x * x - self._xx)
        self._xy += weight * (x * y - self._xy)
        self.known = True

    def start_and_slope(self, most: float) -> tuple[float, float]:
        """Value at 0, between 0 and ``most``, and slope, above 0. Where the points are too near to each other to tell
        two from one, the line begins at 0."""
        spread = self._xx - self._x**2
        start = 0.0
        if spread > 0.01 * self._x**2:
            start = self._y - self._x * (self._xy - self._x * self._y) / spread
        start = min(max(start, 0.0), most, 0.9 * self._y)
        return start, (self._y - start) / self._x
