"""``--draft-vocab``: the tokens a block drafter may draft, where drafting from all costs more than it brings."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from dspark_runtime.errors import UsageError


def read_draft_vocab(path: Path, vocab_size: int) -> torch.Tensor:
    """int64 [tokens], ascending: the target ids in ``path``, an int64 .npy or a JSON list. Raises UsageError."""
    try:
        raw = np.load(path) if path.suffix == ".npy" else json.loads(path.read_text("utf-8"))
        ids = np.asarray(raw)
    except (OSError, ValueError) as error:
        raise UsageError(f"--draft-vocab {path} cannot be read: {error}; give an .npy or a JSON list of ids") from error
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or not len(ids):
        raise UsageError(f"--draft-vocab {path} holds no list of token ids; give an .npy or a JSON list of ids")
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise UsageError(f"--draft-vocab {path} holds ids outside the vocabulary of {vocab_size}; use the target's ids")
    if len(np.unique(ids)) != len(ids):
        raise UsageError(f"--draft-vocab {path} repeats ids; give each once")
    return torch.from_numpy(np.sort(ids.astype(np.int64)))
