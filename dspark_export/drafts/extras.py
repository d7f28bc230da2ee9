"""Files beside a drafter's weights for what its format has no place for: the tokens it may draft, its calibration."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from dspark_runtime.errors import InvalidVocabMap, UsageError

VOCABULARY = "draft_vocabulary.safetensors"
"""``d2t`` (int64 offsets from draft ids to target ids) and ``t2d`` (membership) of a reduced vocabulary."""

CALIBRATION = "calibration.json"
"""``confidence_temperatures``, one per slot, and the calibration errors before and after."""


def read_draft_vocab(path: Path, vocab_size: int) -> torch.Tensor:
    """``--draft-vocab``, int64 [tokens], ascending: the target ids in ``path``, an int64 .npy or a JSON list.

    Raises UsageError.
    """
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


def stored_vocabulary(folder: Path, vocab_size: int) -> torch.Tensor | None:
    """int64 [draft vocab], ascending: the tokens a drafter was trained for; None if it does not have a map.

    Raises InvalidVocabMap for ids outside the vocabulary or given twice.
    """
    path = folder / VOCABULARY
    if not path.is_file():
        return None
    offsets = load_file(path)["d2t"].to(torch.int64)
    ids = offsets + torch.arange(len(offsets))
    if not len(ids) or int(ids.min()) < 0 or int(ids.max()) >= vocab_size or len(torch.unique(ids)) != len(ids):
        raise InvalidVocabMap(f"{path}: d2t leads outside the {vocab_size} tokens or to one twice; get the draft again")
    return ids.sort().values


def stored_temperatures(folder: Path, drafts: int) -> tuple[float, ...] | None:
    """Temperatures of the confidences, one for each of ``drafts`` slots; None if the drafter was not calibrated."""
    path = folder / CALIBRATION
    if not path.is_file():
        return None
    try:
        values = [float(t) for t in json.loads(path.read_text("utf-8"))["confidence_temperatures"]]
    except (ValueError, KeyError, TypeError):
        values = []
    if len(values) != drafts or not all(np.isfinite(v) and v > 0 for v in values):
        raise InvalidVocabMap(
            f"{path} needs confidence_temperatures, {drafts} positive numbers; calibrate the draft again"
        )
    return tuple(values)
