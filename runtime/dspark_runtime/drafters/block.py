"""DSpark and DFlash: one pass drafts a block of tokens from features of the target.

The drafter's cache holds keys and values of committed context rows only. They come from the target's features of
accepted rows, so nothing in it is ever rolled back; the block's own rows follow them and are overwritten. The anchor
has no features yet and is part of the block, at its true position.

Where tokens follow from the text alone, the draft is a tree of the block's likely texts, which the graph follows from
slot to slot. Where they are drawn at random (or the graph gives a chain only), it is a chain, beside which the
most likely alternatives of each slot go as leaves if the graph has them, unless rejection sampling verifies it.
Class of a row: (kind of estimate, bucket of it). The estimate is the draft's own probability, on the main chain of a
drafter with a confidence head its geometric mean with the confidence, which tells right from wrong better than either;
on a chain of drawn tokens the confidence alone.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Sequence

import numpy as np

from dspark_runtime.arrays import AnyArray, FloatArray, IntArray, Runs
from dspark_runtime.backends.protocol import CacheMemory, Features, FeatureStore, GraphEngine, GraphRunner, ResidentTaps
from dspark_runtime.bundle.contract import ATTENTION_MASK, WRITE_INDICES
from dspark_runtime.bundle.draft_contract import (
    ANCHOR_IDS,
    BEAM_PARENTS,
    BEAM_PROBS,
    BEAM_TOKENS,
    BLOCK_POSITIONS,
    CANDIDATE_PROBS,
    CANDIDATE_TOKENS,
    CONFIDENCE_LOGITS,
    DRAFT_PROBS,
    DRAFT_TOKENS,
    FEATURE_POSITIONS,
    TARGET_FEATURES,
    TEMPERATURE,
    UNIFORMS,
)
from dspark_runtime.bundle.manifest import BlockFacts, DrafterEntry
from dspark_runtime.drafters.base import Draft, DraftRequest
from dspark_runtime.drafters.beams import BeamLayout
from dspark_runtime.drafters.cached import CachedDrafter, alone
from dspark_runtime.drafters.estimates import DraftSampling, bucket, expected, over_target
from dspark_runtime.drafters.parts import DrafterParts, required
from dspark_runtime.errors import BackendError, UsageError
from dspark_runtime.speculation.kv_cache import KvCache
from dspark_runtime.speculation.tree import TokenTree

_LEAST_BRANCH = 0.04  # alternatives to a drawn token that are less likely than this are never worth a row
_LEAST_REACH = 0.01  # nor are tokens that are reached less often than this, unless they are on the main chain
_MOST_NODES = 31  # of a tree; the schedule verifies as many as pay


class BlockDrafter(CachedDrafter):
    """See the module's text.

    Args:
        name: as in the manifest.
        engine: the drafter's graph.
        facts: its taps, block and candidates.
        vocab_size: of the target; distributions are given over it.
        positions: positions the draft was made for.
        target_ids: target's id of every draft token, None where they are the same.
        sampling: how tokens are drafted for requests with a temperature.
        threshold: drop the rest of a draft from the first slot whose confidence is below this; 0 keeps all.
        branches: most tokens that may follow one, 1 for a chain; None for as many as are likely.
        pass_ms: milliseconds of a pass, where known.

    Raises:
        UsageError: a threshold without a confidence head or outside [0, 1].
    """

    def __init__(
        self,
        name: str,
        engine: GraphEngine,
        facts: BlockFacts,
        *,
        vocab_size: int,
        positions: int,
        target_ids: IntArray | None = None,
        sampling: DraftSampling = "coupled",
        threshold: float = 0.0,
        branches: int | None = None,
        pass_ms: float | None = None,
    ) -> None:
        super().__init__(name, engine, facts.block, positions, pass_ms)
        if not 0.0 <= threshold <= 1.0:
            raise UsageError(f"confidence_threshold={threshold}: give a number from 0 (keep all drafts) to 1")
        if threshold > 0 and not facts.confidence:
            raise UsageError(f"drafter {name} has no confidence head; leave confidence_threshold at 0")
        self.taps = facts.taps
        self.sampling: DraftSampling = sampling
        self.steady = sampling == "rejection"
        self._facts = facts
        self._vocab_size = vocab_size
        self._target_ids = target_ids
        self._threshold = threshold
        self._branches = branches
        self._layout = BeamLayout(facts.drafts, facts.beams, facts.candidates) if facts.beams else None
        self._scales = np.array(facts.confidence_temperatures or [1.0] * facts.drafts, np.float32)
        self._runner: GraphRunner | None = None
        self._features: FeatureStore | None = None
        self._drawn: list[int] = []  # rows of the last pass whose tokens were drawn at random

    @classmethod
    def from_entry(cls, entry: DrafterEntry, parts: DrafterParts) -> BlockDrafter:
        """The drafter of a bundle that ``entry`` describes."""
        facts, options = required(entry.block, entry), parts.options
        return cls(
            entry.name,
            parts.engine(entry.graph_name),
            facts,
            vocab_size=parts.vocab_size,
            positions=parts.positions(entry),
            target_ids=parts.target_ids(entry),
            sampling=options.sampling,
            threshold=options.threshold if facts.confidence else 0.0,
            branches=options.branches,
            pass_ms=parts.pass_ms(entry.graph_name),
        )

    def draft_ms(self, tokens: int) -> float:
        """One pass, however many tokens."""
        return self.pass_ms

    def _open(self, cache: KvCache, target: CacheMemory) -> None:
        self._runner = self._engine.open(cache.memory)
        self._features = self._runner.features(target)
        self.resident = self._features.resident

    @property
    def _store(self) -> FeatureStore:
        return self.attached(self._features)

    def observe(self, request: int, row: int, features: AnyArray) -> None:
        """Keep features of new context rows for the next pass."""
        self._store.add(row, features)

    def collect(
        self, request: int, row: int, taps: ResidentTaps, batch_row: int, rows: Sequence[int], columns: Runs
    ) -> None:
        """The same, on the device."""
        self._store.collect(row, taps, batch_row, rows, columns)

    def move(self, source: int, target: int) -> None:
        """Move context and pending features to another row."""
        super().move(source, target)
        self._store.move(source, target)

    def prior(self, kind: Hashable) -> float:
        """The middle of the bucket."""
        return expected(kind)

    def draft(self, request: DraftRequest) -> Draft | None:
        """Propose for one sequence alone."""
        return self.propose([request])[0]

    def propose(self, requests: Sequence[DraftRequest]) -> list[Draft | None]:
        """Draft for all sequences in one pass."""
        wanted = {r.row: r for r in requests if r.limit > 0 and self._fits(r)}
        if not wanted:
            return [None] * len(requests)
        store, runner = self._store, self.attached(self._runner)
        while late := alone([store.waiting(row) for row in range(self._count)], self._catch_up):
            for row in late:
                inputs = self._inputs(row, 1, {})
                runner.select(row, 1)
                runner.feed(inputs)
        started = time.perf_counter()
        inputs = self._inputs(0, self._count, wanted)
        runner.select(0, self._count)
        found = runner.run(inputs)
        self._took(started)
        return [self._result(r, found) if r.row in wanted else None for r in requests]

    def _fits(self, request: DraftRequest) -> bool:
        known = self.cache.lengths[request.row] + self._store.waiting(request.row)
        if known != len(request.tokens) - 1:
            raise BackendError(
                f"drafter {self.name} has features of {known} rows, the text has {len(request.tokens) - 1} context rows"
            )
        return len(request.tokens) + self._facts.block <= self._positions

    def _inputs(self, first: int, count: int, wanted: dict[int, DraftRequest]) -> dict[str, Features]:
        """Inputs of a pass over the cache rows ``first`` to ``first + count - 1``, which takes their features in."""
        cache, store, block, drafts = self.cache, self._store, self._facts.block, self._facts.drafts
        taken = [min(store.waiting(row), self._catch_up) for row in range(first, first + count)]
        new = max(1, *taken)
        starts = cache.lengths[first : first + count]
        kv_len = max(starts) + new + block
        cache.reserve(kv_len)
        positions = np.zeros((count, new), np.int64)
        mask = np.zeros((count, 1, block, kv_len), np.bool_)
        anchors = np.zeros(count, np.int64)
        block_positions = np.zeros((count, block), np.int64)
        temperature = np.zeros(count, np.float32)
        uniforms = np.zeros((count, drafts), np.float32)
        for i, (part, start) in enumerate(zip(taken, starts, strict=True)):
            context = start + part
            positions[i] = np.arange(start, start + new)
            block_positions[i] = np.arange(context, context + block)
            mask[i, 0, :, :context] = True
            mask[i, 0, :, start + new : start + new + block] = True
            request = wanted.get(first + i)
            if request is not None:
                anchors[i] = request.tokens[-1]
                if request.temperature and self.sampling != "greedy" and request.sampler is not None:
                    coupled = self.sampling == "coupled"
                    temperature[i] = request.temperature
                    uniforms[i] = request.sampler.draft_uniforms(len(request.tokens), drafts, coupled)
            cache.lengths[first + i] = context
        self._drawn = [first + i for i in range(count) if temperature[i] > 0]
        return {
            TARGET_FEATURES: store.take(first, taken, new),
            FEATURE_POSITIONS: positions,
            ANCHOR_IDS: anchors,
            BLOCK_POSITIONS: block_positions,
            ATTENTION_MASK: mask,
            WRITE_INDICES: np.array(starts, np.int64),
            TEMPERATURE: temperature,
            UNIFORMS: uniforms,
        }

    def _result(self, request: DraftRequest, found: dict[str, AnyArray]) -> Draft | None:
        row = request.row
        tokens: list[int] = found[DRAFT_TOKENS][row].tolist()
        chosen: FloatArray = found[CANDIDATE_PROBS][row]
        confidences: list[float] = []
        if CONFIDENCE_LOGITS in found:
            confidences = (1.0 / (1.0 + np.exp(-found[CONFIDENCE_LOGITS][row] / self._scales))).tolist()
        keep = min(len(tokens), request.limit)
        for slot, confidence in enumerate(confidences[:keep]):
            if confidence < self._threshold:
                keep = slot
                break
        if keep == 0:
            return None
        if request.temperature and self.sampling == "rejection":
            probs = found[DRAFT_PROBS][self._drawn.index(row), :keep]
            probs = over_target(probs, self._vocab_size, self._target_ids)
            return Draft(TokenTree.chain(request.tokens[-1], tokens[:keep]), (), probs, confidences[:keep])
        drawn = request.temperature and self.sampling != "greedy"
        if self._layout is not None and not drawn and self._branches != 1:
            return self._likely_texts(request, found, keep, confidences, self._layout)
        estimates = confidences or chosen[:, 0].tolist()
        kind = "confidence" if confidences else "probability"
        if confidences and not drawn:
            kind, estimates = "confident", np.sqrt(np.multiply(confidences, chosen[: len(confidences), 0])).tolist()
        branches = 2 if self._branches is None else self._branches
        tree, classes = _tree(
            request.tokens[-1], tokens[:keep], [(kind, bucket(e)) for e in estimates[:keep]],
            found[CANDIDATE_TOKENS][row], chosen, min(branches, self._facts.candidates),
        )  # fmt: skip
        return Draft(tree, classes, None, confidences[:keep])

    def _likely_texts(
        self,
        request: DraftRequest,
        found: dict[str, AnyArray],
        depth: int,
        confidences: Sequence[float],
        layout: BeamLayout,
    ) -> Draft:
        nodes = layout.tree(
            *(found[name][request.row] for name in (BEAM_TOKENS, BEAM_PROBS, BEAM_PARENTS)),
            most=_MOST_NODES,
            depth=depth,
            children=self._branches or self._facts.candidates,
            least=_LEAST_REACH,
        )
        classes: list[Hashable] = [("likely", bucket(prob)) for prob in nodes.probs]
        for row, confidence in zip(nodes.main, confidences, strict=False):
            classes[row - 1] = ("confident", bucket((confidence * nodes.probs[row - 1]) ** 0.5))
        tree = TokenTree([request.tokens[-1], *nodes.tokens], [-1, *nodes.parents])
        return Draft(tree, classes, None, confidences[: len(nodes.main)])


def _tree(
    anchor: int,
    tokens: Sequence[int],
    kinds: Sequence[Hashable],
    candidates: IntArray,
    probs: FloatArray,
    branches: int,
) -> tuple[TokenTree, list[Hashable]]:
    """The chain and, beside each of its rows, the most likely other candidates of the slot as leaves."""
    if branches < 2:
        return TokenTree.chain(anchor, tokens), list(kinds)
    rows, parents, classes = [anchor], [-1], list[Hashable]()
    tip = 0
    for slot, (token, kind) in enumerate(zip(tokens, kinds, strict=True)):
        rows.append(token)
        parents.append(tip)
        classes.append(kind)
        below = len(rows) - 1
        left = branches - 1
        for other, prob in zip(candidates[slot].tolist(), probs[slot].tolist(), strict=True):
            if other == token or left == 0:
                continue
            if prob < _LEAST_BRANCH:
                break
            rows.append(other)
            parents.append(tip)
            classes.append(("beside", bucket(prob)))
            left -= 1
        tip = below
    return TokenTree(rows, parents), classes
