"""The processes of one training: one alone, or those that ``torchrun`` has started.

Each computes its part of every batch. The first one writes; the others read its files, from a folder that all see.
"""

from __future__ import annotations

import os
from datetime import timedelta

import torch
from torch import Tensor, distributed

from dspark_runtime.errors import UsageError

# What torchrun sets, and what holds without it.
_ENVIRONMENT = (("WORLD_SIZE", "1"), ("RANK", "0"), ("LOCAL_RANK", "0"))
_PATIENCE = timedelta(days=7)  # while the first one lets the target write


class Processes:
    """``count`` processes, of which this is number ``rank``; ``device`` is its own."""

    def __init__(self, device: torch.device, count: int = 1, rank: int = 0) -> None:
        self.device, self.count, self.rank = device, count, rank

    @classmethod
    def joined(cls, device: torch.device) -> Processes:
        """Those that ``torchrun`` started together with this one, or this one alone.

        Raises:
            UsageError: more processes than GPUs.
        """
        count, rank, local = (int(os.environ.get(name, start)) for name, start in _ENVIRONMENT)
        if count == 1:
            return cls(device)
        if device.type == "cuda":
            if local >= torch.cuda.device_count():
                raise UsageError(
                    f"process {local} of this machine has no GPU of its own, there are {torch.cuda.device_count()}: "
                    "start at most as many processes as GPUs, or use --device cpu"
                )
            device = torch.device("cuda", local)
            torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        distributed.init_process_group(backend, timeout=_PATIENCE)
        return cls(device, count, rank)

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def wait(self) -> None:
        """Wait until all are here."""
        if self.count > 1:
            distributed.all_reduce(torch.zeros(1))  # on the CPU: no GPU spins meanwhile

    def total(self, values: Tensor) -> Tensor:
        """The sum of ``values`` over all processes."""
        if self.count > 1:
            values = values.detach().clone()
            distributed.all_reduce(values)
        return values

    def close(self) -> None:
        """Leave the others."""
        if self.count > 1:
            distributed.destroy_process_group()
