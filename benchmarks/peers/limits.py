"""What the machine allows: products per second, beside the bandwidth of memory."""

from __future__ import annotations

import statistics
import time

_SIDE, _REPEATS = 1024, 7


def measure_products(threads: int) -> float:
    """Multiply-adds of float32 matrices per second, in torch on ``threads`` threads; the median over repeats.

    Products of 8-bit integers run at up to four times that where the processor has dot products for them.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        left, right = (torch.rand(_SIDE, _SIDE) for _ in range(2))
        seconds = []
        for _ in range(_REPEATS):
            began = time.perf_counter()
            torch.mm(left, right)
            seconds.append(time.perf_counter() - began)
    finally:
        torch.set_num_threads(before)
    return float(_SIDE**3 / statistics.median(seconds))
