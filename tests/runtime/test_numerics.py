"""Passes over the cache: what is beyond the mask does not matter, trees equal their paths, nothing is copied."""

from __future__ import annotations

import numpy as np
import pytest

from dspark_runtime.arrays import FloatArray
from dspark_runtime.backends.ort import HostCache, OrtRunner
from dspark_runtime.errors import CapacityError
from dspark_runtime.speculation.kv_cache import KvCache
from dspark_runtime.speculation.tree import TokenTree
from tests.runtime.conftest import Tiny

PROMPT = [5, 9, 20, 33, 47, 8, 8, 100, 41, 17, 300, 2, 61]
TREE = TokenTree.from_paths(7, [[1, 2, 3, 4], [1, 2, 9], [1, 5], [6, 2, 3], [10]])
TOLERANCE = 2e-5


class Passes:
    """Runs prompts and trees through the target, one sequence per row."""

    def __init__(self, tiny: Tiny, batch: int = 1, capacity: int = 128) -> None:
        self.memory: HostCache = tiny.target.allocate(batch, capacity)
        self.cache = KvCache(self.memory, 512)
        self.runner: OrtRunner = tiny.target.open(self.memory)

    def run(self, row: int, tree: TokenTree, slack: int = 0) -> FloatArray:
        """Logits of all rows of ``tree`` after what is committed; ``slack`` more slots lie under a false mask."""
        start, rows = self.cache.lengths[row], len(tree)
        self.runner.select(row, 1)
        buffers = self.runner.prepare(rows, rows, start + rows + slack)
        buffers.input_ids[0] = tree.tokens
        buffers.position_ids[0] = tree.positions(start)
        buffers.write_indices[0] = start
        buffers.logit_rows[0] = np.arange(rows)
        buffers.attention_mask[:] = False
        buffers.attention_mask[..., :start] = True
        buffers.attention_mask[0, 0, :, start : start + rows] = tree.ancestors()
        self.runner.run()
        return buffers.logits[0].copy()

    def prompt(self, row: int, tokens: list[int]) -> FloatArray:
        logits = self.run(row, TokenTree.chain(tokens[0], tokens[1:]))
        self.cache.commit(row, range(len(tokens)))
        return logits

    def poison(self, value: float) -> None:
        """Overwrite every slot after the committed text."""
        for array in self.memory.tensors().values():
            for row, length in enumerate(self.cache.lengths):
                array[row, :, length:] = value


@pytest.fixture(params=["tiny", "tiny_windowed"])
def model(request: pytest.FixtureRequest) -> Tiny:
    tiny: Tiny = request.getfixturevalue(request.param)
    return tiny


@pytest.mark.parametrize("poison", [float("nan"), 1e4, float("inf")])
def test_poisoned_suffix_changes_nothing(model: Tiny, poison: float) -> None:
    clean = Passes(model)
    clean.prompt(0, PROMPT)
    expected = clean.run(0, TREE)
    poisoned = Passes(model)
    poisoned.poison(poison)
    poisoned.prompt(0, PROMPT)
    poisoned.poison(poison)
    assert np.array_equal(poisoned.run(0, TREE), expected)


def test_finite_garbage_under_the_mask_changes_nothing(model: Tiny) -> None:
    clean = Passes(model)
    clean.prompt(0, PROMPT)
    expected = clean.run(0, TREE)
    clean.poison(1e4)
    assert np.abs(clean.run(0, TREE, slack=24) - expected).max() < TOLERANCE


def test_each_path_alone_gives_the_logits_of_the_tree(model: Tiny) -> None:
    passes = Passes(model)
    passes.prompt(0, PROMPT)
    whole = passes.run(0, TREE)
    for leaf in TREE.leaves():
        path = TREE.path(leaf)
        tokens = [TREE.tokens[row] for row in path]
        alone = passes.run(0, TokenTree.chain(tokens[0], tokens[1:]))
        assert np.abs(alone - whole[path]).max() < TOLERANCE


def test_siblings_may_stand_in_any_order(model: Tiny) -> None:
    passes = Passes(model)
    passes.prompt(0, PROMPT)
    whole = passes.run(0, TREE)
    turned = TokenTree.from_paths(7, [[10], [6, 2, 3], [1, 5], [1, 2, 9], [1, 2, 3, 4]])
    logits = passes.run(0, turned)
    place = {tuple(TREE.tokens[r] for r in TREE.path(row)): row for row in range(len(TREE))}
    for row in range(len(turned)):
        same = place[tuple(turned.tokens[r] for r in turned.path(row))]
        assert np.abs(logits[row] - whole[same]).max() < TOLERANCE


def test_accepted_rows_of_a_tree_equal_a_fresh_decode(model: Tiny) -> None:
    for leaf in TREE.leaves():
        passes = Passes(model)
        passes.prompt(0, PROMPT)
        passes.run(0, TREE)
        path = TREE.path(leaf)
        passes.cache.commit(0, path)
        assert passes.cache.lengths == [len(PROMPT) + len(path)]
        after = passes.run(0, TokenTree.chain(77, [78, 79]))
        fresh = Passes(model)
        fresh.prompt(0, [*PROMPT, *(TREE.tokens[row] for row in path)])
        assert np.abs(fresh.run(0, TokenTree.chain(77, [78, 79])) - after).max() < TOLERANCE


def test_rollback_then_decode_equals_fresh_decode(model: Tiny) -> None:
    passes = Passes(model)
    passes.prompt(0, [*PROMPT, 1, 2, 3, 4])
    passes.cache.rollback(0, len(PROMPT))
    again = passes.run(0, TREE)
    fresh = Passes(model)
    fresh.prompt(0, PROMPT)
    assert np.abs(fresh.run(0, TREE) - again).max() < TOLERANCE
    with pytest.raises(ValueError, match="cannot roll back"):
        passes.cache.rollback(0, 100)


def test_prefill_split_at_every_place(model: Tiny) -> None:
    whole = Passes(model)
    expected = whole.prompt(0, PROMPT)[-1]
    for cut in range(1, len(PROMPT)):
        parts = Passes(model)
        parts.prompt(0, PROMPT[:cut])
        assert np.abs(parts.prompt(0, PROMPT[cut:])[-1] - expected).max() < TOLERANCE


def test_rows_of_a_batch_do_not_mix(model: Tiny) -> None:
    alone = Passes(model)
    alone.prompt(0, PROMPT)
    expected = alone.run(0, TREE)
    batch = Passes(model, batch=3)
    for row, prompt in enumerate([[4] * 20, PROMPT, [1, 2]]):
        batch.prompt(row, prompt)
    assert np.abs(batch.run(1, TREE) - expected).max() < TOLERANCE
    batch.cache.replace(0, 1)
    assert np.abs(batch.run(0, TREE) - expected).max() < TOLERANCE


def test_growing_keeps_the_cache(model: Tiny) -> None:
    passes = Passes(model, capacity=64)
    passes.prompt(0, PROMPT)
    expected = passes.run(0, TREE)
    passes.cache.reserve(65)
    assert passes.memory.capacity == 128
    assert np.abs(passes.run(0, TREE) - expected).max() == 0
    with pytest.raises(CapacityError, match="the limit is 512"):
        passes.cache.reserve(513)


def test_caches_are_updated_in_place(tiny: Tiny, capfd: pytest.CaptureFixture[str]) -> None:
    """ONNX Runtime says so on standard error when it has to copy a cache; and the new rows arrive in our memory."""
    passes = Passes(tiny)
    before = {key: array.copy() for key, array in passes.memory.tensors().items()}
    passes.prompt(0, PROMPT)
    for key, array in passes.memory.tensors().items():
        assert np.abs(array[0, :, : len(PROMPT)]).sum() > 0
        assert np.array_equal(array[0, :, len(PROMPT) :], before[key][0, :, len(PROMPT) :])
    captured = capfd.readouterr()
    assert "cop" not in captured.err.lower()


def test_a_pass_beyond_the_allocated_slots_is_refused(tiny: Tiny) -> None:
    with pytest.raises(CapacityError, match="only 64 are allocated"):
        Passes(tiny, capacity=64).runner.prepare(1, 1, 65)
