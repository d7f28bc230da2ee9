"""Faults in the runtime: each is caught, and named by the check it belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

import dspark_runtime.decoding.fill
import dspark_runtime.speculation.verify
from dspark_runtime.arrays import BoolArray
from dspark_runtime.backends.ort import HostCache
from dspark_runtime.backends.protocol import Runner, StepBuffers
from dspark_runtime.decoding.loop import DecodingLoop
from dspark_runtime.drafters.block import BlockDrafter
from dspark_runtime.phrases.tables import PackedPhrases, PhraseTable
from dspark_runtime.speculation.kv_cache import KvCache
from dspark_runtime.speculation.tree import TokenTree
from dspark_runtime.speculation.verify import Verdict
from tests.validate.conftest import Healthy, Validated
from tests.validate.test_graph_faults import failure


def test_siblings_that_see_each_other(healthy: Healthy, validated: Validated, monkeypatch: pytest.MonkeyPatch) -> None:
    right = TokenTree.ancestors

    def wrong(self: TokenTree) -> BoolArray:
        mask = right(self).copy()
        for row, parent in enumerate(self.parents):
            for other in range(row):
                mask[row, other] |= self.parents[other] == parent
        return mask

    monkeypatch.setattr(TokenTree, "ancestors", wrong)
    report = validated(healthy.bundle)
    assert "mask" in failure(report, "robustness.tree_against_paths").where
    assert not [c for c in report.failures() if c.id.startswith("numerics.target")]  # the graph is not to blame


def test_a_slot_one_off(healthy: Healthy, validated: Validated, monkeypatch: pytest.MonkeyPatch) -> None:
    right = dspark_runtime.decoding.fill.fill_trees

    def wrong(runner: Runner, cache: KvCache, *rest: Any) -> StepBuffers:
        cache.reserve(max(cache.lengths) + 40)
        buffers = right(runner, cache, *rest)
        buffers.write_indices[:] += 1
        return buffers

    for module in ("dspark_runtime.decoding.loop", "dspark_export.validate.probe"):
        monkeypatch.setattr(f"{module}.fill_trees", wrong)
    report = validated(healthy.bundle)
    failure(report, "robustness.tree_against_paths")
    failure(report, "losslessness.plain")


def test_an_accept_rule_that_takes_one_too_many(
    healthy: Healthy, validated: Validated, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = dspark_runtime.speculation.verify.verify_tree

    def wrong(tree: TokenTree, *rest: Any) -> Verdict:
        verdict = right(tree, *rest)
        following = tree.first_child(verdict.path[-1])
        if following < 0:
            return verdict
        tokens = [*verdict.tokens[:-1], tree.tokens[following], verdict.tokens[-1]]
        return Verdict([*verdict.path, following], tokens)

    for module in (
        "dspark_runtime.speculation.verify",
        "dspark_runtime.decoding.loop",
        "dspark_export.validate.sampling",
    ):
        monkeypatch.setattr(f"{module}.verify_tree", wrong)
    report = validated(healthy.bundle)
    assert "verify_tree" in failure(report, "losslessness.rules").where
    assert "dspark" in failure(report, "losslessness.dspark").where


def test_compaction_in_the_wrong_order(healthy: Healthy, validated: Validated, monkeypatch: pytest.MonkeyPatch) -> None:
    right = HostCache.gather

    def wrong(self: HostCache, sequence: int, sources: Sequence[int], to: int) -> None:
        right(self, sequence, sources[::-1], to)

    monkeypatch.setattr(HostCache, "gather", wrong)
    assert "compaction" in failure(validated(healthy.bundle), "robustness.compaction").where


def test_confidences_applied_after_verification(
    healthy: Healthy, validated: Validated, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = BlockDrafter._result

    def wrong(self: BlockDrafter, *rest: Any) -> Any:
        kept, self._threshold = self._threshold, 0.0
        try:
            return right(self, *rest)
        finally:
            self._threshold = kept

    monkeypatch.setattr(BlockDrafter, "_result", wrong)
    found = failure(validated(healthy.bundle), "plumbing.confidences.dspark")
    assert "between drafting and verification" in found.where


def test_features_of_the_wrong_rows(healthy: Healthy, validated: Validated, monkeypatch: pytest.MonkeyPatch) -> None:
    """The text stays right; only the comparison with the PyTorch loop, or with floors, can show it."""
    right = DecodingLoop._show

    def wrong(self: DecodingLoop, sequence: Any, taps: Any, batch_row: int, rows: Sequence[int]) -> None:
        right(self, sequence, None if taps is None else np.roll(taps, 1, axis=1), batch_row, rows)

    monkeypatch.setattr(DecodingLoop, "_show", wrong)
    report = validated(healthy.bundle)
    assert not [c.id for c in report.failures() if c.family == "losslessness"]
    failure(report, "plumbing.features.dspark")


def test_a_store_that_loses_what_it_learned(
    healthy: Healthy, validated: Validated, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = PhraseTable.load

    def wrong(self: PhraseTable, packed: PackedPhrases) -> None:
        half = len(packed) // 2
        rows = [(int(packed.keys[place]), *packed.context(place)) for place in range(half)]
        right(self, PackedPhrases.of(rows))

    monkeypatch.setattr(PhraseTable, "load", wrong)
    assert "saving" in failure(validated(healthy.bundle), "plumbing.store").where


def test_a_history_without_a_bound(healthy: Healthy, validated: Validated, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PhraseTable, "_forget", lambda self: None)
    assert "bound" in failure(validated(healthy.bundle), "plumbing.store").where
