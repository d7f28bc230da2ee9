"""The processes of one training: one alone, or those that ``torchrun`` has started.

Each computes its part of every batch. The first one writes; the others read its files, from a folder that all see.
"""

from __future__ import annotations

import os
from datetime import timedelta

import torch
from torch import Tensor, distributed

from dspark_runtime.errors import UsageError

_PATIENCE = timedelta(days=7)  # while the first one lets the target write


class Processes:
    """``count`` processes, of which this is number ``rank``; ``device`` is its own.

    Alone unless ``torchrun`` (which sets RANK and WORLD_SIZE) started it.
    """

    def __init__(self, device: torch.device) -> None:
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        self.device = device
        if self.count == 1:
            return
        if device.type == "cuda":
            local = int(os.environ.get("LOCAL_RANK", "0"))
            if local >= torch.cuda.device_count():
                raise UsageError(
                    f"process {local} of this machine has no GPU of its own, there are {torch.cuda.device_count()}: "
                    "start at most as many processes as GPUs, or use --device cpu"
                )
            self.device = torch.device("cuda", local)
            torch.cuda.set_device(self.device)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        distributed.init_process_group(backend, timeout=_PATIENCE)

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
        if self.count > 1 and distributed.is_initialized():
            distributed.destroy_process_group()
