"""Fills the buffers of a pass: a chunk of one prompt, or a token tree after every running sequence."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dspark_runtime.backends.protocol import Runner, StepBuffers
from dspark_runtime.speculation.kv_cache import KvCache
from dspark_runtime.speculation.tree import TokenTree

_COUNT = np.arange(256)


def fill_prompt(
    runner: Runner, cache: KvCache, row: int, start: int, tokens: Sequence[int], min_rows: int = 1
) -> StepBuffers:
    """Prepare a pass over ``tokens`` of one prompt, which go to the slots from ``start`` on of cache row ``row``.

    Only the last token's logits are requested: ``logits[0, 0]``. Fewer than ``min_rows`` tokens are padded; the
    padding follows them, and whatever comes next overwrites it.

    Raises:
        CapacityError: the cache has no room.
    """
    count = len(tokens)
    rows = max(count, min_rows)
    cache.reserve(start + rows)
    runner.select(row, 1)
    buffers = runner.prepare(rows, 1, start + rows)
    buffers.input_ids[0, :count] = tokens
    buffers.input_ids[0, count:] = 0
    buffers.position_ids[0, :count] = np.arange(start, start + count)
    buffers.position_ids[0, count:] = start
    buffers.write_indices[0] = start
    buffers.logit_rows[0, 0] = count - 1
    mask = buffers.attention_mask
    mask[..., :start] = True
    mask[0, 0, :, start:] = np.tri(rows, dtype=np.bool_)
    return buffers


def fill_trees(runner: Runner, cache: KvCache, trees: Sequence[TokenTree], min_rows: int = 1) -> StepBuffers:
    """Prepare a pass over one tree for each of the first ``len(trees)`` cache rows, after what they have committed.

    Every sequence gets as many rows as the largest tree has, and at least ``min_rows``: what a tree lacks is padding
    that sees only itself. All rows' logits are requested: ``logits[i, :len(trees[i])]`` are those of tree ``i``.

    Raises:
        CapacityError: the cache has no room.
    """
    batch, rows = len(trees), min_rows
    for tree in trees:
        rows = max(rows, len(tree.tokens))
    lengths = cache.lengths
    slots = max(lengths[:batch]) + rows
    cache.reserve(slots)
    runner.select(0, batch)
    buffers = runner.prepare(rows, rows, slots)
    mask = buffers.attention_mask
    if rows == 1:  # an anchor alone sees all slots up to its own; this is every step of plain decoding
        starts = np.array(lengths[:batch])
        buffers.input_ids[:, 0] = [tree.tokens[0] for tree in trees]
        buffers.position_ids[:, 0] = buffers.write_indices[:] = starts
        buffers.logit_rows[:] = 0
        np.less_equal(np.arange(mask.shape[-1]), starts[:, None], out=mask[:, 0, 0])
        return buffers
    buffers.logit_rows[:] = _COUNT[:rows]
    for i, tree in enumerate(trees):
        start, count = lengths[i], len(tree)
        buffers.input_ids[i, :count] = tree.tokens
        buffers.position_ids[i, :count] = tree.positions(start)
        buffers.write_indices[i] = start
        mask[i, 0, :count, :start] = True
        mask[i, 0, :count, start : start + count] = tree.ancestors()
        mask[i, 0, :count, start + count :] = False
        if count < rows:  # padding: token 0, sees itself only
            buffers.input_ids[i, count:] = 0
            buffers.position_ids[i, count:] = start
            mask[i, 0, count:, :] = False
            padding = np.arange(count, rows)
            mask[i, 0, padding, start + padding] = True
    return buffers
