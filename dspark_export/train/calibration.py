"""Sequential Temperature Scaling: one temperature per slot, so that confidences mean what they say.

Slot after slot, the temperature T is chosen that makes the product of sigmoid((logit + shift) / T) over the slots so
far closest to the share of rounds in which all of them were accepted (least expected calibration error); earlier slots
stay. The shift is one for all slots: a drafter agrees more often with texts it was trained on than with others;
its head relies on that, and no temperature corrects it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dspark_export.train.evaluate import Evaluation

BINS = 20
_GRID = np.exp(np.linspace(np.log(1 / 8), np.log(8), 97))
_SHIFTS = np.linspace(-1.5, 1.5, 31)


@dataclass(frozen=True)
class Calibration:
    """``shift`` of all logits, to be added to the bias of the head, and ``temperatures`` per slot; expected calibration
    errors of the products ``before`` and ``after``, in [0, 1]."""

    shift: float
    temperatures: tuple[float, ...]
    before: float
    after: float


def calibrate(logits: np.ndarray, right: np.ndarray) -> Calibration:
    """Fit to held-out rounds: confidence ``logits`` and whether slots survived, both [rounds, block]."""
    before = overall_error(logits, right, np.ones(logits.shape[1]))
    untouched = (0.0, (1.0,) * logits.shape[1], before)
    fits = [untouched, *((float(shift), *_fitted(logits + shift, right)) for shift in _SHIFTS)]
    shift, temperatures, after = min(fits, key=lambda fit: (fit[2], abs(fit[0])))
    return Calibration(shift, temperatures, before, after)


def _fitted(logits: np.ndarray, right: np.ndarray) -> tuple[tuple[float, ...], float]:
    """Temperatures, and the error they leave."""
    reach = np.ones(len(logits))
    chosen = []
    for slot in range(logits.shape[1]):
        options = [reach * _sigmoid(logits[:, slot] / t) for t in _GRID]
        errors = [calibration_error(option, right[:, slot]) for option in options]
        best = int(np.argmin(errors))
        chosen.append(float(_GRID[best]))
        reach = options[best]
    return tuple(chosen), overall_error(logits, right, np.array(chosen))


def calibrated(found: Evaluation) -> tuple[Calibration, Calibration]:
    """What fits all rounds, and an honest error: fitted to every other round, measured on the rest."""
    if found.rounds < 2:
        nothing = Calibration(0.0, (1.0,) * found.right.shape[1], 0.0, 0.0)
        return nothing, nothing
    half = calibrate(found.logits[::2], found.right[::2])
    logits, right = found.logits[1::2], found.right[1::2]
    before = overall_error(logits, right, np.ones(logits.shape[1]))
    after = overall_error(logits + half.shift, right, np.array(half.temperatures))
    return calibrate(found.logits, found.right), Calibration(half.shift, half.temperatures, before, after)


def overall_error(logits: np.ndarray, right: np.ndarray, temperatures: np.ndarray) -> float:
    """Expected calibration error of the cumulative confidences of all slots together."""
    products = np.cumprod(_sigmoid(logits / temperatures), 1)
    return calibration_error(products.ravel(), right.ravel())


def calibration_error(estimates: np.ndarray, came_true: np.ndarray) -> float:
    """Mean distance, over 20 bins of the estimate, between estimates and what came true; 0 without any."""
    if not len(estimates):
        return 0.0
    bins = np.minimum((estimates * BINS).astype(int), BINS - 1)
    gaps = np.bincount(bins, estimates - came_true, BINS)
    return float(np.abs(gaps).sum() / len(estimates))


def _sigmoid(x: np.ndarray) -> np.ndarray:
    out: np.ndarray = 1 / (1 + np.exp(-x))
    return out
