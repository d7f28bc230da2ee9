"""Types of numpy arrays, by what their numbers are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.float32]
AnyArray = npt.NDArray[Any]
Runs = Sequence[tuple[int, int]]
"""(first, count) of neighbouring rows or columns, ascending."""
