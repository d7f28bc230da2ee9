"""Options of a training run."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from dspark_runtime.errors import UsageError

Markov = Literal["none", "vanilla", "gated", "rnn"]
Optimizer = Literal["muon", "adamw"]
Arithmetic = Literal["float32", "bfloat16"]
FeatureReader = Literal["model", "bundle"]
TREE = 15
"""Drafts of the trees that a finished drafter is judged by, beside its chain."""
_RATES: dict[Optimizer, float] = {"muon": 5e-3, "adamw": 1e-3}


@dataclass(frozen=True)
class DrafterShape:
    """Size of the drafter.

    ``layers``: decoder layers as wide as the target's. ``block``: tokens drafted per round. ``taps``: target layers it
    reads, ascending, -1 for the embedding; None for five spread over the depth. ``rank`` of the Markov head, which
    ``markov`` names. ``draft_vocab``: the target's most frequent tokens it can draft, None for all.
    ``intermediate``: width of the feed-forward part, None for the target's. ``kv_heads``: key and value heads, None for
    as many as query heads: all a drafter knows of the text goes through the values of few layers, and a target that
    shares heads has few of them.

    Raises:
        UsageError: a number outside its range.
    """

    layers: int = 1
    block: int = 5
    taps: tuple[int, ...] | None = None
    markov: Markov = "vanilla"
    rank: int = 32
    draft_vocab: int | None = None
    intermediate: int | None = None
    kv_heads: int | None = None
    confidence: bool = True

    def __post_init__(self) -> None:
        for name, low, high in (("layers", 1, 64), ("block", 2, 64), ("rank", 1, 4096)):
            _whole(name, getattr(self, name), low, high)
        if self.draft_vocab is not None:
            _whole("draft_vocab", self.draft_vocab, 16, 10**7)
        for name in ("intermediate", "kv_heads"):
            if getattr(self, name) is not None:
                _whole(name, getattr(self, name), 1, 10**6)
        if self.markov not in get_args(Markov):
            raise UsageError(f"--markov {self.markov} is unknown; choose {', '.join(get_args(Markov))}")
        if self.taps is not None and list(self.taps) != sorted(set(self.taps)):
            raise UsageError(f"--taps {','.join(map(str, self.taps))}: give layers in ascending order, each once")


@dataclass(frozen=True)
class TrainOptions:
    """How a drafter is trained.

    ``steps`` of ``batch`` sequences times ``accumulate``, with up to ``anchors`` blocks in each sequence of up to
    ``max_length`` tokens. ``optimizer``: ``muon`` for matrices and AdamW for the rest, or AdamW alone. ``rate``: peak
    learning rate, None for the optimizer's usual one; reached after ``warmup`` of the steps, falling to 0 as a cosine;
    beside Muon, AdamW takes five times as much. ``ema``: share of the old average
    kept at every step, 0 for none. ``ce``, ``tv``, ``confidence``: weights of the terms of the loss; ``decay``: slot k
    (from 0) weighs exp(-k / decay). ``evaluate_every`` steps accepted length is measured on held-out responses.
    ``target_top``: tokens of the target's distribution that are kept of each row.

    Raises:
        UsageError: a number outside its range.
    """

    shape: DrafterShape = field(default_factory=DrafterShape)
    steps: int = 2000
    batch: int = 16
    accumulate: int = 1
    anchors: int = 32
    max_length: int = 512
    optimizer: Optimizer = "muon"
    rate: float | None = None
    warmup: float = 0.04
    clip: float = 1.0
    ema: float = 0.998
    ce: float = 0.1
    tv: float = 0.9
    confidence: float = 1.0
    decay: float = 4.0
    evaluate_every: int = 200
    target_top: int = 64
    chunk: int = 2048
    seed: int = 0
    dtype: Arithmetic = "float32"

    def __post_init__(self) -> None:
        for name, low, high in (
            ("steps", 1, 10**8),
            ("batch", 1, 4096),
            ("accumulate", 1, 4096),
            ("anchors", 1, 4096),
            ("max_length", 8, 2**20),
            ("evaluate_every", 1, 10**8),
            ("target_top", 1, 4096),
            ("chunk", 1, 10**7),
            ("seed", 0, 2**63 - 1),
        ):
            _whole(name, getattr(self, name), low, high)
        for name, high_f in (("rate", 1.0), ("warmup", 1.0), ("clip", 1e6), ("ema", 0.999999)):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= high_f:
                raise UsageError(f"--{name} {value}: give a number from 0 to {high_f:g}")
        if self.optimizer not in get_args(Optimizer):
            raise UsageError(f"--optimizer {self.optimizer} is unknown; choose {', '.join(get_args(Optimizer))}")
        if self.dtype not in get_args(Arithmetic):
            raise UsageError(f"--dtype {self.dtype} is unknown; choose {' or '.join(get_args(Arithmetic))}")

    @property
    def peak_rate(self) -> float:
        """``rate``, or what it is by default."""
        return _RATES[self.optimizer] if self.rate is None else self.rate

    def fingerprint(self) -> dict[str, Any]:
        """What a resumed training must have in common with the one it continues."""
        return asdict(self)


def _whole(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise UsageError(f"--{name.replace('_', '-')} {value!r}: give a whole number from {low} to {high}")
