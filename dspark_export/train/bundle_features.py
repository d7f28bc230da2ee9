"""Features and likely tokens as a bundle's own graph computes them, in its precision: what a drafter meets there."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dspark_export.train.features import Rows, most_likely
from dspark_runtime import Bundle
from dspark_runtime.errors import UsageError
from dspark_runtime.speculation.kv_cache import round_up

_CHUNK = 128  # tokens of a pass


class BundleTarget:
    """The target of ``bundle``, reading whole texts; see :class:`~dspark_export.train.features.TappedTarget`.

    Raises:
        UsageError: its target graph does not return layers ``taps``.
    """

    def __init__(self, bundle: Bundle, taps: Sequence[int]) -> None:
        self._engine = bundle.engine("target")
        known = self._engine.taps
        if missing := [tap for tap in taps if tap not in known]:
            raise UsageError(
                f"the bundle's target returns layers {list(known)} and not {missing}: build it with a --draft that "
                "reads the same layers, such as the one to start from, or take --features model"
            )
        width = self._engine.taps_width // len(known)
        self._columns = np.concatenate([np.arange(width) + width * known.index(tap) for tap in taps])
        self._memory = self._engine.allocate(1, round_up(_CHUNK))
        self._runner = self._engine.open(self._memory)

    def __call__(self, ids: Sequence[int], start: int, top: int) -> Rows:
        """The rows of a text whose response begins at ``start``."""
        if len(ids) > self._memory.capacity:
            self._memory.resize(round_up(len(ids)), 0)
        features: list[Tensor] = []
        tops: tuple[list[Tensor], list[Tensor]] = ([], [])
        taught = min(start, len(ids) - 1)  # the first row whose next token is learnt
        for first in range(0, len(ids), _CHUNK):
            part = ids[first : first + _CHUNK]
            wanted = first + len(part) > taught
            logits, taps = self._pass(part, first, len(part) if wanted else 1)
            features.append(torch.from_numpy(taps).to(torch.bfloat16))
            found = most_likely(torch.from_numpy(logits), top)
            before = max(0, min(len(part), taught - first)) if wanted else len(part)
            for parts, values in zip(tops, found, strict=True):
                rows = values.new_zeros(len(part), values.shape[-1])
                rows[before:] = values[before:] if wanted else 0
                parts.append(rows)
        return Rows(torch.cat(features), torch.cat(tops[0]), torch.cat(tops[1]))

    def _pass(self, ids: Sequence[int], first: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """Logits [rows, vocab] of the last ``rows`` and features [tokens, width], float32."""
        count = len(ids)
        step = self._runner.prepare(count, rows, first + count)
        positions = np.arange(first, first + count)
        step.input_ids[0], step.position_ids[0] = ids, positions
        step.attention_mask[0, 0] = np.arange(first + count) <= positions[:, None]
        step.write_indices[:] = first
        step.logit_rows[0] = np.arange(count - rows, count)
        self._runner.run()
        assert step.taps is not None
        return step.logits[0], np.ascontiguousarray(step.taps[0][:, self._columns], np.float32)
