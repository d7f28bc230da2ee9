"""Real passes of a decoder: prompts teacher-forced through chunked prefill, token trees, chains and single rows.

Inputs of every pass are kept with their caches, so that any runner can be given them. The caches hold what the
graph under test wrote in earlier passes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dspark_runtime.arrays import AnyArray
from dspark_runtime.bundle.contract import (
    ATTENTION_MASK,
    INPUT_IDS,
    LOGIT_ROWS,
    PAST,
    POSITION_IDS,
    PRESENT,
    WRITE_INDICES,
)

Run = Callable[[dict[str, AnyArray]], dict[str, AnyArray]]
_SPARE = 24  # slots after the text, so that there is something to poison


@dataclass(frozen=True)
class Pass:
    """One pass over ``tokens`` after ``history``; ``parents[i] < i``, -1 for the root. ``feeds``: every input."""

    name: str
    history: tuple[int, ...]
    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    feeds: dict[str, AnyArray]

    def path(self, node: int) -> list[int]:
        """Rows from the root to ``node``."""
        up = [node]
        while self.parents[up[-1]] >= 0:
            up.append(self.parents[up[-1]])
        return up[::-1]


def inputs_of(
    history: int, tokens: Sequence[int], parents: Sequence[int], caches: dict[str, AnyArray]
) -> dict[str, AnyArray]:
    """Inputs of a pass of one sequence over a tree."""
    count = len(tokens)
    # From the parents alone, not by the runtime's own tree: a fault there must not hide here.
    block, depths = np.eye(count, dtype=np.bool_), np.zeros(count, np.int64)
    for row, parent in enumerate(parents):
        if parent >= 0:
            block[row] |= block[parent]
            depths[row] = depths[parent] + 1
    positions = history + depths
    mask = np.ones((1, 1, count, history + count), np.bool_)
    mask[0, 0, :, history:] = block
    return {
        INPUT_IDS: np.array([tokens], np.int64),
        POSITION_IDS: positions[None],
        ATTENTION_MASK: mask,
        WRITE_INDICES: np.array([history], np.int64),
        LOGIT_ROWS: np.arange(count, dtype=np.int64)[None],
        **caches,
    }


def record(run: Run, ids: Sequence[int], cache: dict[str, tuple[tuple[int, ...], Any]], seed: int = 0) -> list[Pass]:
    """The passes of one text through a graph; it needs at least 12 tokens. ``run`` gives every output, caches whole.

    ``cache``: shape [1, heads, capacity, width], with 0 for the capacity, and type of every past tensor.
    """
    random = np.random.default_rng(seed)
    capacity = len(ids) + _SPARE
    caches = {
        name: np.zeros([capacity if size == 0 else size for size in shape], kind)
        for name, (shape, kind) in cache.items()
    }
    passes: list[Pass] = []

    def go(name: str, history: int, tokens: Sequence[int], parents: Sequence[int]) -> dict[str, AnyArray]:
        feeds = inputs_of(history, tokens, parents, caches)
        passes.append(Pass(name, tuple(ids[:history]), tuple(tokens), tuple(parents), feeds))
        found = run(feeds)
        return {PAST + n.removeprefix(PRESENT): np.array(v) for n, v in found.items() if n.startswith(PRESENT)}

    body = len(ids) - 9
    half = body // 2
    caches = go(f"prefill of {half} tokens", 0, ids[:half], range(-1, half - 1)) or caches
    caches = go(f"prefill of {body - half} more", half, ids[half:body], range(-1, body - half - 1)) or caches
    # A tree whose accepted path is the text: a sibling precedes every true token.
    wrong = [int(t) for t in random.choice(np.setdiff1d(np.arange(max(ids)), ids[body : body + 4]), 4, replace=False)]
    tokens = [ids[body], wrong[0], ids[body + 1], wrong[1], wrong[2], ids[body + 2], wrong[3], ids[body + 3]]
    parents = [-1, 0, 0, 1, 2, 2, 5, 5]
    written = go(f"tree of 8 after {body}", body, tokens, parents)
    accepted = [0, 2, 5, 7]
    caches = {name: array.copy() for name, array in (written or caches).items()}
    for array in caches.values():
        array[:, :, body : body + 4] = array[:, :, [body + row for row in accepted]]
    caches = go(f"chain of 4 after {body + 4}", body + 4, ids[body + 4 : body + 8], range(-1, 3)) or caches
    go(f"one row after {body + 8}", body + 8, ids[body + 8 : body + 9], [-1])
    return passes
