"""The runtime's own passes, one at a time, and the plain passes they are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from dspark_export.build.row_noise import row_logits
from dspark_export.drafts.recording import host_tensors
from dspark_runtime import Bundle
from dspark_runtime.arrays import AnyArray, FloatArray
from dspark_runtime.backends.opening import HostBackend
from dspark_runtime.backends.protocol import FLOAT_PRODUCTS, MOST_ROWS
from dspark_runtime.decoding.fill import fill_prompt, fill_trees
from dspark_runtime.decoding.request import make_requests
from dspark_runtime.speculation.kv_cache import KvCache, round_up
from dspark_runtime.speculation.tree import TokenTree

ROOM = 48  # tokens a probe may commit after its prompts


class Probe:
    """Prompts in a cache, and passes after them that are called by hand: filled as the decoding loop fills its own.

    Args:
        bundle: what runs.
        prompts: are prefilled, each in its own cache row.
        chunk: prompt tokens of a pass.
        rows: fewest rows of a pass; what a tree lacks is padded.
        room: tokens that may be committed after the prompts.

    Raises:
        CapacityError: a prompt does not fit.
    """

    def __init__(
        self, bundle: Bundle, prompts: Sequence[Sequence[int]], *, chunk: int = 512, rows: int = 2, room: int = ROOM
    ) -> None:
        requests = make_requests(prompts, bundle.limits, max_new_tokens=room)
        engine = bundle.engine("target", len(prompts) > 1)
        slots = round_up(max(len(request.prompt) for request in requests) + room + MOST_ROWS)
        self.cache = KvCache(engine.allocate(len(requests), slots), slots)
        self.runner = engine.open(self.cache.memory)
        self._rows = rows
        for row, request in enumerate(requests):
            for start in range(0, len(request.prompt), chunk):
                part = request.prompt[start : start + chunk]
                fill_prompt(self.runner, self.cache, row, start, part, rows)
                self.runner.run()
                self.cache.commit(row, range(len(part)))

    def run_trees(self, trees: Sequence[TokenTree]) -> list[FloatArray]:
        """Logits [rows, vocab] of each tree after what its sequence has committed; nothing is committed."""
        buffers = fill_trees(self.runner, self.cache, trees, self._rows)
        self.runner.run()
        return [buffers.logits[i, : len(tree)].copy() for i, tree in enumerate(trees)]

    def committed(self, row: int) -> dict[tuple[int, str], AnyArray]:
        """Keys and values [kv_heads, length, width] of one sequence, by layer and part."""
        tensors = host_tensors(self.cache.memory)
        return {place: array[row, :, : self.cache.lengths[row]].copy() for place, array in tensors.items()}

    def poison(self, value: float) -> None:
        """Overwrite every slot after those that are committed."""
        for tensor in host_tensors(self.cache.memory).values():
            for row, length in enumerate(self.cache.lengths):
                tensor[row, :, length:] = value


def with_float_products(bundle: Bundle) -> Bundle:
    """The same bundle, with quantized products in float32, so that no rounding hides or makes a difference."""
    options = bundle.engine_options
    if not options.accuracy_level:
        return bundle
    options = replace(options, accuracy_level=FLOAT_PRODUCTS)
    return Bundle(bundle.files, options, bundle.exact, bundle.limits.positions, HostBackend(bundle.files, options))


def one_pass(bundle: Bundle, ids: Sequence[int], rows: int) -> FloatArray:
    """Logits [rows, vocab] after the last ``rows`` tokens of a text that runs as one chain in an empty cache."""
    # The first pass of row_logits gives none, so two tokens go before.
    found: FloatArray = row_logits(bundle.target, ids, min(2, len(ids) - rows), len(ids))[-rows:]
    return found


def branching(ids: Sequence[int], at: int, vocab: int, seed: int = 0) -> tuple[TokenTree, list[int]]:
    """A tree of 8 rows after ``ids[:at]`` whose accepted path is the text, and the rows of that path.

    A wrong sibling precedes every true token, so that the path has gaps.
    """
    true = [int(token) for token in ids[at : at + 4]]
    random = np.random.default_rng(seed)
    wrong = [int(t) for t in random.choice(min(vocab, 1000), 16, replace=False) if t not in true][:4]
    tokens = [true[0], wrong[0], true[1], wrong[1], wrong[2], true[2], wrong[3], true[3]]
    return TokenTree(tokens, [-1, 0, 0, 1, 2, 2, 5, 5]), [0, 2, 5, 7]
