"""Overconfident confidences are lowered to what actually happens."""

from __future__ import annotations

import numpy as np
import pytest

from dspark_export.train.calibration import calibrate, calibrated, overall_error
from dspark_export.train.evaluate import Evaluation


def rounds(count: int, shift: float, scale: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits whose slots are right with the chance sigmoid((logit + shift) / scale), given those before."""
    random = np.random.default_rng(seed)
    logits = random.normal(0.5, 1.5, (count, 4))
    right = random.random((count, 4)) < 1 / (1 + np.exp(-(logits + shift) / scale))
    return logits, np.cumprod(right, 1).astype(bool)


@pytest.mark.parametrize(("shift", "scale"), [(0.0, 1.0), (0.0, 2.0), (-0.8, 1.0), (0.5, 0.6)])
def test_what_was_wrong_with_the_logits_is_found(shift: float, scale: float) -> None:
    logits, right = rounds(20000, shift, scale)
    found = calibrate(logits, right)
    assert found.after < 0.02 and found.after <= found.before
    assert found.shift == pytest.approx(shift, abs=0.25)
    np.testing.assert_allclose(found.temperatures, scale, rtol=0.35)
    others, truth = rounds(20000, shift, scale, seed=1)
    assert overall_error(others + found.shift, truth, np.array(found.temperatures)) < 0.02


def test_the_error_is_measured_on_other_rounds() -> None:
    logits, right = rounds(300, 0.0, 1.0)
    wrong = right.copy()
    wrong[1::2] = False
    honest, of_wrong = (
        calibrated(Evaluation(2.0, len(right), (0.5,) * 4, logits.astype(np.float32), each))[1]
        for each in (right, wrong)
    )
    assert (honest.shift, honest.temperatures) == (of_wrong.shift, of_wrong.temperatures)
    assert of_wrong.after > honest.after + 0.1


def test_no_rounds_leave_confidences_alone() -> None:
    nothing = Evaluation(1.0, 0, (0.0,) * 3, np.zeros((0, 3), np.float32), np.zeros((0, 3), bool))
    assert calibrated(nothing)[0].temperatures == (1.0, 1.0, 1.0) and calibrated(nothing)[0].shift == 0.0
