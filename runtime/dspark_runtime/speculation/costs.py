"""The cost of a target pass by its rows and sequences: measured at build time, corrected by every pass that runs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from dspark_runtime.backends.protocol import Engine
from dspark_runtime.speculation.kv_cache import round_up

# Cost of n rows relative to one where nothing was measured yet: between a float32 and a 4-bit model on a CPU.
_GUESS = {1: 1.0, 2: 1.15, 4: 1.4, 8: 1.9, 16: 3.0, 32: 5.2, 64: 10.0}
_GUESS_MS = 20.0
_WARM_UP_PASSES, _WARM_UP_MS = 8, 50.0  # before a pass that is measured
MEASURED_CONTEXT = 256  # committed slots behind which passes are measured
_SLOT_SHARE = 0.03  # of one row's time, for the slots of such a context
_FADING = 0.003
MEASURED_ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


class PassCosts:
    """Milliseconds of a target pass by its rows (of all sequences together) and its sequences.

    A pass takes what its rows take in one sequence, by the ``known`` measurements ``{rows: ms}``, and some more for
    each cache slot its sequences read beyond the measured context. Observed passes correct these two and, for each
    number of sequences, a factor and a curve over the rows of speculative passes. A plain pass corrects the first
    three, so that a batch that shrinks and grows again finds its own times as it left them. A speculative one corrects
    the curve at its rows and, less, around them, and the rest hardly: the cost of plain decoding cannot drift away
    while all passes are speculative.
    """

    def __init__(self, known: Mapping[int, float] | None = None, most_rows: int = 128) -> None:
        points = dict(known or {})
        if 1 not in points or len(points) < 2:
            points = {rows: ratio * points.get(1, _GUESS_MS) for rows, ratio in _GUESS.items()}
        rows = sorted(points)
        if rows[-1] < most_rows:  # beyond the last measurement the last slope goes on
            slope = (points[rows[-1]] - points[rows[-2]]) / (rows[-1] - rows[-2])
            points[most_rows] = points[rows[-1]] + max(slope, 0.0) * (most_rows - rows[-1])
            rows.append(most_rows)
        self._rows = np.arange(1, most_rows + 1, dtype=np.float64)
        self._shape: list[float] = np.interp(self._rows, rows, [points[r] for r in rows]).tolist()
        self._curves: dict[int, list[float]] = {}  # of speculative passes, by their sequences
        self._scale = 1.0
        self._slot_guess = self._slot_ms = _SLOT_SHARE * self._shape[0] / MEASURED_CONTEXT
        self._context = MEASURED_CONTEXT  # slots of a sequence in the last pass
        self._factors: dict[int, float] = {}  # of plain passes, by their sequences
        self._plain_rows = 1  # of a sequence in a plain pass
        self._seen: dict[tuple[int, int], int] = {}
        self._near: dict[int, npt.NDArray[np.float64]] = {}

    def knows(self, batch: int) -> bool:
        """Whether a plain pass over this many sequences was observed."""
        return batch in self._factors

    def ms(self, rows: int, batch: int = 1) -> float:
        """Expected milliseconds of a pass over ``rows`` rows of ``batch`` sequences, with the last one's context."""
        factor = self._factors.get(batch) or _nearest(self._factors, batch, 1.0)
        if rows > batch * self._plain_rows and self._curves:
            curve = self._curves.get(batch) or _nearest(self._curves, batch, [])
            factor *= curve[min(rows, len(curve)) - 1]
        return self._base(rows, batch) * factor

    def _base(self, rows: int, batch: int) -> float:
        shape = self._scale * self._at_rows(rows)
        return max(shape + self._slot_ms * self._more_slots(batch), 0.3 * shape)

    def _at_rows(self, rows: int) -> float:
        known = len(self._shape)
        return self._shape[rows - 1] if rows <= known else self._shape[-1] * rows / known

    def _more_slots(self, batch: int) -> int:
        return batch * self._context - MEASURED_CONTEXT

    def observe(self, rows: int, ms: float, plain: bool, batch: int = 1, context: int | None = None) -> None:
        """Learn from one pass. Single outliers (a hiccup of the machine) count as at most twice the expected time.

        Args:
            rows: of all sequences together.
            ms: what it took.
            plain: it verified nothing.
            batch: sequences in it.
            context: cache slots of each that it read; None for as many as the one before.
        """
        if rows > len(self._shape) or ms <= 0:
            return
        self._context = context or self._context
        key = (batch, rows)
        seen = self._seen.get(key, 0)
        bound = 100.0 if seen < 2 else 2.0  # little is known yet: believe any factor
        ratio = min(max(ms / self.ms(rows, batch), 1.0 / bound), bound)
        self._seen[key] = seen + 1
        change = max(0.1, 1.0 / (seen + 1)) * math.log(ratio)
        if plain:
            self._plain_rows = rows // batch
            # Half of what is wrong goes to what all batches share, half to this one. A factor fades into what they
            # share, so that whatever is common to all of them ends there.
            factor = math.log(_nearest(self._factors, batch, 1.0))
            self._factors[batch] = math.exp(factor - _FADING * factor + change / 2)
            self._correct_base(rows, batch, math.exp(_FADING * factor + change / 2))
        else:
            self._scale *= ratio**0.01
            self._slot_ms *= ratio**0.01
            curve = _nearest(self._curves, batch, [1.0] * len(self._shape))
            self._curves[batch] = (np.array(curve) * np.exp(self._nearness(rows) * change)).tolist()

    def _correct_base(self, rows: int, batch: int, ratio: float) -> None:
        """One step of the projection algorithm (Goodwin and Sin 1984, section 3.3): scale and slots move as little as
        possible for the expected time to change by ``ratio``, each in units of how much it may be wrong."""
        shape, slots = self._at_rows(rows), self._more_slots(batch)
        share = self._scale * shape, 3 * max(self._slot_ms, self._slot_guess) * slots
        error = self._base(rows, batch) * (ratio - 1) / (share[0] ** 2 + share[1] ** 2)
        self._slot_ms = max(self._slot_ms + error * share[1] ** 2 / slots if slots else self._slot_ms, 0.0)
        self._scale = max(self._scale + error * share[0] ** 2 / shape, 0.1 * self._scale)

    def _nearness(self, rows: int) -> npt.NDArray[np.float64]:
        """How far an observation of ``rows`` rows teaches about other numbers: 1 at itself, falling to both sides."""
        near = self._near.get(rows)
        if near is None:
            near = self._near[rows] = 1.0 / (1.0 + np.abs(self._rows - rows) * (4.0 / rows))
        return near


Known = TypeVar("Known")


def _nearest(known: Mapping[int, Known], batch: int, default: Known) -> Known:
    """What is known of the batch nearest in size; ``default`` if nothing is of any."""
    if batch in known or not known:
        return known.get(batch, default)
    return known[min(known, key=lambda other: abs(math.log(other / batch)))]


def pass_timer(engine: Engine, most_rows: int, context: int = MEASURED_CONTEXT) -> Callable[[int], float]:
    """A function that runs one pass over a number of rows after ``context`` committed slots and returns its
    milliseconds."""
    runner = engine.open(engine.allocate(1, round_up(context + most_rows)))
    runner.select(0, 1)

    def timed(count: int) -> float:
        buffers = runner.prepare(count, count, context + count)
        buffers.input_ids[:] = 1
        buffers.position_ids[:] = np.arange(context, context + count)
        buffers.logit_rows[:] = np.arange(count)
        buffers.write_indices[:] = context
        buffers.attention_mask[..., :context] = True
        buffers.attention_mask[0, 0, :, context:] = np.tril(np.ones((count, count), np.bool_))
        started = time.perf_counter()
        runner.run()
        return (time.perf_counter() - started) * 1e3

    return timed


def warmed_up(timed: Callable[[int], float], rows: int) -> float:
    """Milliseconds of a pass after up to 8 like it, or 50 ms of them.

    Where weights nearly fit the processor's last cache, it holds more of them pass by pass, and one row of a 4-bit
    model took 7.6 ms after a pass of 64 rows and 4.4 ms ten passes later.
    """
    spent = 0.0
    for _ in range(_WARM_UP_PASSES):
        spent += timed(rows)
        if spent > _WARM_UP_MS:
            break
    return timed(rows)


def measure_pass_ms(
    engine: Engine, rows: Sequence[int] = MEASURED_ROWS, *, context: int = MEASURED_CONTEXT, repeats: int = 5
) -> dict[int, float]:
    """Median milliseconds of a pass over each number of rows after ``context`` committed slots, each warmed up.

    Row counts alternate, so that a machine that slows down in the meantime slows all of them.
    """
    timed = pass_timer(engine, max(rows), context)
    times: dict[int, list[float]] = {count: [] for count in rows}
    for _ in range(repeats):
        for count in rows:
            times[count].append(warmed_up(timed, count))
    return {count: float(np.median(values)) for count, values in times.items()}
