"""The cost of a target pass by its number of rows: measured at build time, corrected by every pass that runs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from dspark_runtime.backends.protocol import Engine
from dspark_runtime.speculation.kv_cache import round_up

# Cost of n rows relative to one where nothing was measured yet: between a float32 and a 4-bit model on a CPU.
_GUESS = {1: 1.0, 2: 1.15, 4: 1.4, 8: 1.9, 16: 3.0, 32: 5.2, 64: 10.0}
_GUESS_MS = 20.0
_WARM_UP_PASSES, _WARM_UP_MS = 8, 50.0  # before a pass that is measured
MEASURED_ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


class PassCosts:
    """Milliseconds of a target pass by its rows (of all sequences together).

    ``known`` are measurements ``{rows: ms}`` to start from. Observed passes correct two things. A plain pass sets
    the scale (another machine, a longer context, a throttled processor). A speculative one corrects the shape at its
    rows and, less, around them; its part in the scale is small, so that the cost of plain decoding cannot drift away
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
        self._shape = np.interp(self._rows, rows, [points[r] for r in rows])
        self._scale = 1.0
        self._anchor = 1  # rows of the last plain pass: up to there the shape does not change
        self._seen: dict[int, int] = {}
        self._near: dict[int, npt.NDArray[np.float64]] = {}
        self._points: list[float] = self._shape.tolist()  # plain floats: these are read in every round

    def ms(self, rows: int) -> float:
        """Expected milliseconds of a pass over ``rows`` rows."""
        known = len(self._points)
        return self._scale * (self._points[rows - 1] if rows <= known else self._points[-1] * rows / known)

    def observe(self, rows: int, ms: float, plain: bool) -> None:
        """Learn from one pass. Single outliers (a hiccup of the machine) count as at most twice the expected time."""
        if rows > len(self._points) or ms <= 0:
            return
        seen = self._seen.get(rows, 0)
        bound = 100.0 if seen < 2 else 2.0  # little is known yet: believe any factor
        ratio = min(max(ms / self.ms(rows), 1.0 / bound), bound)
        self._seen[rows] = seen + 1
        step = max(0.1, 1.0 / (seen + 1))
        if plain:
            self._scale *= ratio**step
            self._anchor = rows
        else:
            self._scale *= ratio**0.01
            change = np.exp(self._nearness(rows) * (step * math.log(ratio)))
            self._shape[self._anchor :] *= change[self._anchor :]
            self._points = self._shape.tolist()

    def _nearness(self, rows: int) -> npt.NDArray[np.float64]:
        """How far an observation of ``rows`` rows teaches about other numbers: 1 at itself, falling to both sides."""
        near = self._near.get(rows)
        if near is None:
            near = self._near[rows] = 1.0 / (1.0 + np.abs(self._rows - rows) * (4.0 / rows))
        return near


def pass_timer(engine: Engine, most_rows: int, context: int = 256) -> Callable[[int], float]:
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
    """Milliseconds of a pass behind up to 8 like it, or 50 ms of them.

    Where weights nearly fit the processor's last cache, it holds more of them pass by pass, and one row of a 4-bit
    model took 7.6 ms behind a pass of 64 rows and 4.4 ms ten passes later.
    """
    spent = 0.0
    for _ in range(_WARM_UP_PASSES):
        spent += timed(rows)
        if spent > _WARM_UP_MS:
            break
    return timed(rows)


def measure_pass_ms(
    engine: Engine, rows: Sequence[int] = MEASURED_ROWS, *, context: int = 256, repeats: int = 5
) -> dict[int, float]:
    """Median milliseconds of a pass over each number of rows behind ``context`` committed slots, each warmed up.

    Row counts alternate, so that a machine that slows down in the meantime slows all of them.
    """
    timed = pass_timer(engine, max(rows), context)
    times: dict[int, list[float]] = {count: [] for count in rows}
    for _ in range(repeats):
        for count in rows:
            times[count].append(warmed_up(timed, count))
    return {count: float(np.median(values)) for count, values in times.items()}
