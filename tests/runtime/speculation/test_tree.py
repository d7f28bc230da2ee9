"""Token trees: invariants, merging, masks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspark_runtime.errors import InvalidTree
from dspark_runtime.speculation.tree import MAX_DEPTH, MAX_ROWS, TokenTree, merge, parents_of

PATHS = st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=6), min_size=0, max_size=8)


@pytest.mark.parametrize(
    ("tokens", "parents", "says"),
    [
        ([], [], "at least one row"),
        ([1], [], "0 parents"),
        ([1], [0], "row 0 is the anchor"),
        ([1, 2], [-1, -1], "second root"),
        ([1, 2], [-1, 1], "parent 1"),
        ([1, 2, 3], [-1, 2, 1], "parent 2"),
        ([1, 2, 3], [-1, 0, -2], "parent -2"),
        ([1, 2, 3], [-1, 3, 0], "parent 3"),
        ([1, 2, 2], [-1, 0, 0], "repeats token 2"),
        ([1, -1], [-1, 0], "outside the vocabulary"),
        ([1, 10], [-1, 0], "outside the vocabulary of 10"),
        (range(MAX_ROWS + 1), [-1] + [0] * MAX_ROWS, f"{MAX_ROWS + 1} rows"),
        (range(MAX_DEPTH + 2), range(-1, MAX_DEPTH + 1), f"depth {MAX_DEPTH + 1}"),
    ],
)
def test_broken_trees_are_refused(tokens: Any, parents: Any, says: str) -> None:
    vocab = 10 if len(tokens) < 10 else None
    with pytest.raises(InvalidTree, match=says):
        TokenTree(list(tokens), list(parents), vocab)


@pytest.mark.parametrize("rows", [1, 2, MAX_ROWS])
def test_sizes_up_to_the_limit(rows: int) -> None:
    tree = TokenTree(list(range(rows)), [-1] + [0] * (rows - 1))
    assert len(tree) == rows
    assert tree.is_chain == (rows <= 2)
    with pytest.raises(InvalidTree, match="a chain of"):
        TokenTree.chain(0, range(MAX_DEPTH + 1))
    assert len(TokenTree.chain(0, range(MAX_DEPTH))) == MAX_DEPTH + 1


@pytest.mark.parametrize(
    ("mask", "says"),
    [
        (np.zeros((0, 0)), "not empty"),
        (np.zeros((2, 3)), "square"),
        ([[1, 0], [1, 0]], "does not see itself"),
        ([[0, 0], [0, 0]], "does not see itself"),
        ([[1, 0], [0, 1]], "must see the anchor"),
        ([[1, 1], [1, 1]], "anchor, row 0"),
        ([[1, 0, 0], [1, 1, 1], [1, 0, 1]], "only rows before it"),
        ([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 1, 1]], "exactly its parent"),
        ([[1, 0, 0], [1, 1, 0], [0, 1, 1]], "exactly its parent"),
    ],
)
def test_masks_that_are_no_tree_are_refused(mask: Any, says: str) -> None:
    with pytest.raises(InvalidTree, match=says):
        parents_of(np.array(mask, bool))


@given(PATHS)
def test_a_trie_holds_its_paths_and_nothing_else(paths: list[list[int]]) -> None:
    tree = TokenTree.from_paths(9, paths)
    prefixes = {tuple(path[:n]) for path in paths for n in range(1, len(path) + 1)}
    found = {tuple(tree.tokens[r] for r in tree.path(row))[1:] for row in range(1, len(tree))}
    assert found == prefixes
    assert len(tree) == len(prefixes) + 1
    assert TokenTree(tree.tokens, tree.parents) == tree
    for path in paths:
        row = 0
        for token in path:
            row = tree.child(row, token)
            assert row > 0
    assert tree.child(0, 99) == -1


@given(PATHS)
def test_the_mask_shows_ancestors_and_gives_the_parents_back(paths: list[list[int]]) -> None:
    tree = TokenTree.from_paths(9, paths)
    mask = tree.ancestors()
    for row in range(len(tree)):
        assert np.flatnonzero(mask[row]).tolist() == sorted(tree.path(row))
    assert parents_of(mask) == tree.parents
    assert (mask.sum(axis=1) - 1).tolist() == list(tree.depths)
    assert tree.positions(40).tolist() == [40 + depth for depth in tree.depths]


@given(PATHS, PATHS)
def test_merging_is_the_trie_of_both(first: list[list[int]], second: list[list[int]]) -> None:
    trees = [TokenTree.from_paths(9, first), TokenTree.from_paths(9, second)]
    merged, places = merge(trees)
    both = TokenTree.from_paths(9, [*first, *second])
    paths = [{tuple(t.tokens[r] for r in t.path(row)) for row in range(len(t))} for t in (merged, both)]
    assert paths[0] == paths[1]
    for tree, place in zip(trees, places, strict=True):
        assert [merged.tokens[row] for row in place] == list(tree.tokens)
        for row in range(1, len(tree)):
            assert merged.parents[place[row]] == place[tree.parents[row]]


@given(PATHS, st.data())
def test_subtrees_keep_paths(paths: list[list[int]], data: st.DataObject) -> None:
    tree = TokenTree.from_paths(9, paths)
    kept = [0]
    for row in range(1, len(tree)):
        if tree.parents[row] in kept and data.draw(st.booleans()):
            kept.append(row)
    part = tree.subtree(kept)
    for new, old in enumerate(kept):
        assert [part.tokens[r] for r in part.path(new)] == [tree.tokens[r] for r in tree.path(old)]


def test_impossible_merges_and_subtrees_are_refused() -> None:
    with pytest.raises(InvalidTree, match="nothing to merge"):
        merge([])
    with pytest.raises(InvalidTree, match="different anchors"):
        merge([TokenTree.chain(1, [2]), TokenTree.chain(2, [2])])
    with pytest.raises(InvalidTree, match="row 2 is kept"):
        TokenTree.chain(1, [2, 3]).subtree([0, 2])
