"""Drafters that make one pass per level of their tree: EAGLE-3 and independent draft models.

A round is one *extend* pass, which takes the new context into the drafter's cache and gives the first level, and then
one *step* pass per further level over the most promising nodes. Step rows go to the slots after the context.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Hashable, Sequence

import numpy as np

from dspark_runtime.arrays import AnyArray, FloatArray, IntArray
from dspark_runtime.backends.protocol import Features, GraphEngine
from dspark_runtime.bundle.contract import ATTENTION_MASK, INPUT_IDS, LOGIT_ROWS, POSITION_IDS, WRITE_INDICES
from dspark_runtime.drafters.base import Draft, DraftRequest
from dspark_runtime.drafters.cached import CachedDrafter, alone
from dspark_runtime.drafters.estimates import DraftSampling, expected
from dspark_runtime.drafters.growth import Growth


class SteppingDrafter(CachedDrafter):
    """Base of the two; see the module's text.

    Args:
        depth: most levels of a tree.
        width: nodes per level, 1 for chains.
        sampling: how tokens are drafted for requests with a temperature.
        target_ids: target's id of every draft token, None where they are the same.
        readable: it can read the target's ids below this, None for all of them. Texts with others are not drafted for.
    """

    def __init__(
        self,
        name: str,
        engine: GraphEngine,
        *,
        vocab_size: int,
        positions: int,
        target_ids: IntArray | None,
        depth: int,
        width: int,
        sampling: DraftSampling,
        pass_ms: float | None,
        readable: int | None = None,
    ) -> None:
        super().__init__(name, engine, depth * width + 1, positions, pass_ms)
        self.sampling: DraftSampling = sampling
        self.steady = sampling == "rejection"
        self._vocab_size = vocab_size
        self._target_ids = target_ids
        self._depth = depth
        self._width = width
        self._texts: dict[int, Sequence[int]] = {}
        self._growths: dict[int, Growth] = {}
        self._readable = None if readable is None or readable >= vocab_size else readable
        self._unreadable: set[int] = set()  # sequences whose texts hold an id the draft has no row for

    def prior(self, kind: Hashable) -> float:
        """The middle of the bucket."""
        return expected(kind)

    def draft(self, request: DraftRequest) -> Draft | None:
        """Propose for one sequence alone."""
        return self.propose([request])[0]

    def begin(self, request: int, prompt: Sequence[int]) -> None:
        """Look whether the draft can read the prompt."""
        self._look_at(request, prompt)

    def commit(self, request: int, tokens: Sequence[int]) -> None:
        """Look whether the draft can read what was committed."""
        self._look_at(request, tokens)

    def end(self, request: int) -> None:
        """Forget the sequence."""
        self._growths.pop(request, None)
        self._unreadable.discard(request)

    def _look_at(self, request: int, tokens: Sequence[int]) -> None:
        if self._readable is not None and any(token >= self._readable for token in tokens):
            self._unreadable.add(request)

    def propose(self, requests: Sequence[DraftRequest]) -> list[Draft | None]:
        """Grow a tree for every sequence that wants one, level by level, all in the same passes."""
        self._growths = {
            r.request: Growth(r, self._depth, self._width, self.sampling, self._vocab_size, self._target_ids)
            for r in requests
            if r.limit > 0 and r.request not in self._unreadable and len(r.tokens) + self._depth < self._positions
        }
        if not self._growths:
            return [None] * len(requests)
        self._texts = {r.row: r.tokens for r in requests}
        by_row = {g.request.row: g for g in self._growths.values()}
        while late := alone([self._waiting(row) for row in range(self._count)], self._catch_up):
            for row in late:
                counts, inputs = self._context(row, 1, leave=1)
                self._feed(row, counts, inputs)
        started = time.perf_counter()
        ahead = max(self.cache.lengths[row] + self._waiting(row) for row in range(self._count))
        self.cache.reserve(ahead + self._scratch)  # a cache that grows later would lose the rows of the first levels
        logits = self._run_extend(*self._context(0, self._count))[:, 0]
        self._took(started)
        for row, growth in by_row.items():
            growth.grow([0], logits[row][None])
        ran = [0] * self._count
        while any(growth.open for growth in by_row.values()):
            started = time.perf_counter()
            self._step(by_row, ran)
            self._took(started)
        self._texts = {}
        return [g.result() if (g := self._growths.get(r.request)) else None for r in requests]

    # Passes --------------------------------------------------------------------------------------------------------

    @abstractmethod
    def _waiting(self, row: int) -> int:
        """Context rows of a sequence that are not in the drafter's cache yet."""

    @abstractmethod
    def _feed(self, row: int, counts: Sequence[int], inputs: dict[str, Features]) -> None:
        """Fill in what the kind of drafter adds and take the context of one sequence in; the logits are not wanted."""

    @abstractmethod
    def _run_extend(self, counts: Sequence[int], inputs: dict[str, Features]) -> FloatArray:
        """The same for all sequences; keep what the steps need. Logits [batch, 1, draft vocab]."""

    @abstractmethod
    def _run_step(self, chosen: dict[int, list[int]], inputs: dict[str, Features]) -> FloatArray:
        """The same for a level; ``chosen`` nodes by row. Logits [batch, rows, draft vocab]."""

    @abstractmethod
    def _token_at(self, row: int, position: int) -> int:
        """Token of the context row at ``position``."""

    def _context(self, first: int, count: int, leave: int = 0) -> tuple[list[int], dict[str, Features]]:
        """Inputs that take in the waiting context of ``count`` sequences, but for the last ``leave`` rows of each.

        Also how many rows of each; only the last one's logits are requested.
        """
        cache = self.cache
        counts = [min(self._waiting(row) - leave, self._catch_up) for row in range(first, first + count)]
        new = max(1, *counts)
        starts = cache.lengths[first : first + count]
        inputs = self._inputs(count, new, 1, max(starts) + new, starts)
        for i, (start, taken) in enumerate(zip(starts, counts, strict=True)):
            inputs[INPUT_IDS][i, :taken] = self._readable_ids(first + i, start, taken)
            inputs[POSITION_IDS][i] = np.arange(start, start + new)
            inputs[ATTENTION_MASK][i, 0, :, :start] = True
            inputs[ATTENTION_MASK][i, 0, :, start : start + new] = np.tri(new, dtype=np.bool_)
            inputs[LOGIT_ROWS][i, 0] = max(taken - 1, 0)
        for row, taken in enumerate(counts, first):
            cache.lengths[row] += taken
        return counts, dict(inputs)

    def _readable_ids(self, row: int, start: int, count: int) -> list[int]:
        """Context tokens; in place of one the draft has no row for, token 0: the sequence sits in the batch all the
        same, and nothing is drafted for it."""
        tokens = [self._token_at(row, start + k) for k in range(count)]
        return tokens if self._readable is None else [token if token < self._readable else 0 for token in tokens]

    def _step(self, by_row: dict[int, Growth], ran: list[int]) -> None:
        """Run the next level of every growing tree and let it grow."""
        cache = self.cache
        chosen = {row: list(growth.frontier) for row, growth in by_row.items() if growth.open}
        rows = max(len(nodes) for nodes in chosen.values())
        starts = [cache.lengths[row] + ran[row] for row in range(self._count)]
        inputs = self._inputs(self._count, rows, rows, max(starts) + rows, starts)
        inputs[LOGIT_ROWS][:] = np.arange(rows)
        mask = inputs[ATTENTION_MASK]
        for row, start in enumerate(starts):
            mask[row, 0, range(rows), range(start, start + rows)] = True
            inputs[POSITION_IDS][row] = cache.lengths[row]
            for i, node in enumerate(chosen.get(row, ())):
                growth, context = by_row[row], cache.lengths[row]
                growth.passes[node] = ran[row] + i
                inputs[INPUT_IDS][row, i] = growth.tokens[node]
                inputs[POSITION_IDS][row, i] = context + growth.level - 1
                mask[row, 0, i, :context] = True
                mask[row, 0, i, [context + place for place in growth.row_mask(node)]] = True
        logits = self._run_step(chosen, dict(inputs))
        for row, nodes in chosen.items():
            ran[row] += rows
            by_row[row].grow(nodes, logits[row, : len(nodes)])

    def _inputs(self, batch: int, tokens: int, rows: int, kv_len: int, starts: Sequence[int]) -> dict[str, AnyArray]:
        self.cache.reserve(kv_len)
        return {
            INPUT_IDS: np.zeros((batch, tokens), np.int64),
            POSITION_IDS: np.zeros((batch, tokens), np.int64),
            ATTENTION_MASK: np.zeros((batch, 1, tokens, kv_len), np.bool_),
            WRITE_INDICES: np.array(starts, np.int64),
            LOGIT_ROWS: np.zeros((batch, rows), np.int64),
        }
