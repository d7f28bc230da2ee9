"""Inputs to trace a graph with: every symbolic dim gets a different size, so torch cannot mistake two for one."""

from __future__ import annotations

import torch

from dspark_runtime.bundle.contract import (
    ATTENTION_MASK,
    INPUT_IDS,
    LOGIT_ROWS,
    POSITION_IDS,
    GraphContract,
)

SIZES = {"batch": 2, "tokens": 5, "kv_len": 23, "capacity": 31, "rows": 3}


def example_inputs(contract: GraphContract) -> list[torch.Tensor]:
    """One tensor for each input of a decoder contract: five tokens written at slots 7 and 11 of a cache of 31."""
    made = []
    batch, tokens = SIZES["batch"], SIZES["tokens"]
    for spec in contract.inputs:
        shape = [SIZES[d] if isinstance(d, str) else d for d in spec.shape]
        dtype = getattr(torch, spec.dtype)
        if spec.name == INPUT_IDS:
            tensor = torch.arange(batch * tokens).reshape(batch, tokens)
        elif spec.name == POSITION_IDS:
            tensor = torch.arange(tokens).repeat(batch, 1) + 7
        elif spec.name == ATTENTION_MASK:
            tensor = torch.ones(shape, dtype=torch.bool)
        elif spec.name == LOGIT_ROWS:
            tensor = torch.zeros(shape, dtype=torch.int64)
        elif dtype is torch.int64:
            tensor = torch.tensor([7, 11])
        else:
            tensor = torch.zeros(shape, dtype=dtype)
        made.append(tensor)
    return made
