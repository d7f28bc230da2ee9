"""How many tokens of a prompt are computed between two rounds."""

from __future__ import annotations

_FEWEST = 16
_MEMORY = 0.2  # weight of the newest measurement


class ChunkSize:
    """Learns what prompt tokens and rounds take, so that a chunk takes at most ``share`` of a round.

    Args:
        most: tokens of a chunk while other requests run.
        alone: tokens of a chunk while nothing else runs.
        share: rounds that a chunk may take.
        fixed: every chunk has ``most`` tokens.
    """

    def __init__(self, most: int, alone: int, share: float = 1.0, fixed: bool = False) -> None:
        self._most, self._alone, self._share = min(most, alone), alone, share
        self._fixed = fixed
        self._token_s = self._round_s = 0.0

    def tokens(self, beside: bool) -> int:
        """Tokens of the next chunk; ``beside`` if other requests wait for it."""
        if self._fixed:
            return self._most
        if not beside:
            return self._alone
        if not self._token_s or not self._round_s:
            return self._most
        fitting = int(self._share * self._round_s / self._token_s)
        return max(min(fitting, self._most), min(_FEWEST, self._most))

    def observe(self, prompt_tokens: int, seconds: float) -> None:
        """A step took this long; it computed this much of a prompt, or was a round if that is 0."""
        if prompt_tokens:
            self._token_s = _mean(self._token_s, seconds / prompt_tokens)
        else:
            self._round_s = _mean(self._round_s, seconds)


def _mean(old: float, new: float) -> float:
    return new if not old else old + _MEMORY * (new - old)
