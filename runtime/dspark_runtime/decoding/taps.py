"""Which of the target's features a drafter reads."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dspark_runtime.arrays import IntArray, Runs
from dspark_runtime.backends.protocol import Engine
from dspark_runtime.drafters.base import Drafter
from dspark_runtime.errors import IncompatibleBundle


@dataclass(frozen=True)
class TapReader:
    """A drafter and the columns of the target's ``hidden_taps`` that it reads, as runs and as an index."""

    drafter: Drafter
    runs: Runs
    columns: IntArray | slice

    @classmethod
    def of(cls, engine: Engine, drafter: Drafter) -> TapReader:
        """IncompatibleBundle if the target lacks a tap of ``drafter``."""
        if missing := [tap for tap in drafter.taps if tap not in engine.taps]:
            raise IncompatibleBundle(
                f"drafter {drafter.name} reads the target's layers {list(drafter.taps)}, but this target graph returns "
                f"{list(engine.taps)}, without {missing}; build the bundle again with this draft"
            )
        if drafter.taps == engine.taps:
            return cls(drafter, [(0, engine.taps_width)], slice(None))
        width = engine.taps_width // len(engine.taps)
        runs = [(engine.taps.index(tap) * width, width) for tap in drafter.taps]
        return cls(drafter, runs, np.concatenate([np.arange(start, start + width) for start, width in runs]))
