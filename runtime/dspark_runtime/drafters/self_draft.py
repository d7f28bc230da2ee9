"""Self-draft: some of the target's own layers, then its norm and head, propose a chain token by token.

It reads the target's cache and needs none itself: its scratch rows go to the slots after the committed text, which
the verify pass overwrites. Each step is one pass over one row. Drafting stops early when the probability that the chain
is still correct falls below what one more token is worth.

Class of a row: (bucket of the draft's own probability, whether it is the runner-up).
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Sequence

import numpy as np

from dspark_runtime.arrays import FloatArray
from dspark_runtime.backends.protocol import Engine, Runner
from dspark_runtime.drafters.base import Draft, Drafter, DraftRequest
from dspark_runtime.drafters.estimates import bucket
from dspark_runtime.speculation.kv_cache import KvCache
from dspark_runtime.speculation.tree import TokenTree

_EDGES = (0.3, 0.5, 0.7, 0.85, 0.95)


class SelfDrafter(Drafter):
    """See the module's text.

    Args:
        engine: the ``self_draft`` graph.
        agreement: share of positions where its token is the target's, as measured at build time.
        pass_ms: milliseconds of one step, where known.
        branch: also propose the runner-up of each step as a leaf.
    """

    name = "self-draft"

    def __init__(
        self, engine: Engine, agreement: float | None = None, pass_ms: float | None = None, branch: bool = False
    ) -> None:
        self._engine = engine
        self._agreement = 0.5 if agreement is None else agreement
        self._branch = branch
        self._cache: KvCache | None = None
        self._runner: Runner | None = None
        self._count = 0
        self.pass_ms = 0.0 if pass_ms is None else pass_ms

    def attach(self, cache: KvCache) -> None:
        """Open the engine over the target's cache."""
        self._cache = cache
        self._runner = self._engine.open(cache.memory)
        self._count = len(cache.lengths)

    def select(self, count: int) -> None:
        """Draft for the first ``count`` rows of the cache."""
        self._count = count

    def prior(self, kind: Hashable) -> float:
        """The measured agreement, moved towards the draft's own probability."""
        if not isinstance(kind, tuple):
            return self._agreement
        number, runner_up = kind
        own = (0.15, 0.4, 0.6, 0.78, 0.9, 0.98)[number]
        return float(0.5 * (own + self._agreement)) * (0.2 if runner_up else 1.0)

    def draft(self, request: DraftRequest) -> Draft | None:
        """Propose for one sequence alone."""
        return self.propose([request])[0]

    def propose(self, requests: Sequence[DraftRequest]) -> list[Draft | None]:
        """Draft for all sequences together; a sequence drops out when its limit or its floor is reached."""
        cache, runner = self.attached(self._cache), self.attached(self._runner)
        chains = [_Chain(request) for request in requests]
        longest = max((request.limit for request in requests), default=0)
        runner.select(0, self._count)
        step = 0
        while step < longest and any(chain.open for chain in chains):
            logits = self._pass(runner, cache, chains, step)
            for chain in chains:
                if chain.open:
                    chain.extend(logits[chain.request.row], self._branch)
            step += 1
        return [chain.result() for chain in chains]

    def _pass(self, runner: Runner, cache: KvCache, chains: Sequence[_Chain], step: int) -> FloatArray:
        started = time.perf_counter()
        longest = max(cache.lengths[: self._count]) + step + 1
        cache.reserve(longest)
        buffers = runner.prepare(1, 1, longest)
        buffers.logit_rows[:] = 0
        buffers.input_ids[:] = 0
        mask = buffers.attention_mask
        mask[:] = False
        for row in range(self._count):
            at = cache.lengths[row] + step
            buffers.write_indices[row] = at
            buffers.position_ids[row] = cache.lengths[row]  # of rows nobody drafts for; the others follow
            mask[row, 0, 0, : at + 1] = True
        for chain in chains:
            if chain.open:
                buffers.input_ids[chain.request.row] = chain.last
                buffers.position_ids[chain.request.row] += step
        runner.run()
        took = (time.perf_counter() - started) * 1e3
        self.pass_ms = took if not self.pass_ms else self.pass_ms + 0.1 * (min(took, 2 * self.pass_ms) - self.pass_ms)
        return buffers.logits[:, 0]


class _Chain:
    """The growing proposal of one sequence."""

    def __init__(self, request: DraftRequest) -> None:
        self.request = request
        self.last = request.tokens[-1]
        self.open = request.limit > 0
        self._tokens = [self.last]
        self._parents = [-1]
        self._classes: list[Hashable] = []
        self._tip = 0
        self._steps = 0
        self._reach = 1.0

    def extend(self, logits: FloatArray, branch: bool) -> None:
        best = int(logits.argmax())
        weights = np.exp(logits - logits[best])
        share = 1.0 / float(weights.sum())
        kind = (bucket(share, _EDGES), False)
        self._reach *= self.request.rate(kind)
        if self._reach < self.request.floor:
            self.open = False
            return
        parent = self._tip
        self._tip = self._add(best, parent, kind)
        if branch:
            weights[best] = 0.0
            second = int(weights.argmax())
            self._add(second, parent, (bucket(float(weights[second]) * share, _EDGES), True))
        self.last = best
        self._steps += 1
        self.open = self._steps < self.request.limit

    def _add(self, token: int, parent: int, kind: Hashable) -> int:
        self._tokens.append(token)
        self._parents.append(parent)
        self._classes.append(kind)
        return len(self._tokens) - 1

    def result(self) -> Draft | None:
        if len(self._tokens) == 1:
            return None
        return Draft(TokenTree(self._tokens, self._parents), self._classes)
