"""Token trees: what drafters propose and one pass verifies.

Row 0 is the *anchor*, the last committed token, whose keys and values are not in the cache yet. Every other row is a
draft token; its parent is an earlier row. A row sees only the committed text, its ancestors and itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from dspark_runtime.arrays import BoolArray, IntArray
from dspark_runtime.errors import InvalidTree

MAX_ROWS = 256
MAX_DEPTH = 128

_LOWER = np.tril(np.ones((MAX_ROWS, MAX_ROWS), np.bool_))
_COUNT = np.arange(MAX_ROWS, dtype=np.int64)


class TokenTree:
    """An immutable tree of tokens in topological order.

    Args:
        tokens: one token id per row, the anchor first.
        parents: row of each row's parent; -1 for the anchor only.
        vocab_size: where given, ids must lie below it.

    Raises:
        InvalidTree: the rows are not a tree, siblings repeat a token, or a limit (256 rows, depth 128) is passed.
    """

    __slots__ = ("depths", "is_chain", "parents", "tokens")

    def __init__(self, tokens: Sequence[int], parents: Sequence[int], vocab_size: int | None = None) -> None:
        self.tokens = tuple(tokens)
        self.parents = tuple(parents)
        self.depths = _checked_depths(self.tokens, self.parents, vocab_size)
        self.is_chain = all(parent == row - 1 for row, parent in enumerate(self.parents))

    @classmethod
    def chain(cls, anchor: int, drafts: Sequence[int]) -> TokenTree:
        """The tree without branches: each draft follows the one before it."""
        tree = cls.__new__(cls)
        rows = len(drafts) + 1
        if rows > MAX_DEPTH + 1:
            raise InvalidTree(f"a chain of {rows - 1} drafts; at most {MAX_DEPTH} are possible")
        tree.tokens = (anchor, *drafts)
        tree.parents = tuple(range(-1, rows - 1))
        tree.depths = tuple(range(rows))
        tree.is_chain = True
        return tree

    @classmethod
    def from_paths(cls, anchor: int, paths: Iterable[Sequence[int]]) -> TokenTree:
        """The trie of several continuations: a shared prefix appears in the tree once."""
        tokens, parents = [anchor], [-1]
        children: dict[tuple[int, int], int] = {}
        for path in paths:
            row = 0
            for token in path:
                key = (row, token)
                if key not in children:
                    children[key] = len(tokens)
                    tokens.append(token)
                    parents.append(row)
                row = children[key]
        return cls(tokens, parents)

    def __len__(self) -> int:
        return len(self.tokens)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TokenTree) and (self.tokens, self.parents) == (other.tokens, other.parents)

    def __hash__(self) -> int:
        return hash((self.tokens, self.parents))

    def __repr__(self) -> str:
        return f"TokenTree(tokens={self.tokens}, parents={self.parents})"

    def child(self, row: int, token: int) -> int:
        """Row of the child of ``row`` that holds ``token``, or -1."""
        if self.is_chain:
            following = row + 1
            return following if following < len(self.tokens) and self.tokens[following] == token else -1
        for candidate in range(row + 1, len(self.tokens)):
            if self.parents[candidate] == row and self.tokens[candidate] == token:
                return candidate
        return -1

    def first_child(self, row: int) -> int:
        """The first child of ``row``, or -1."""
        if self.is_chain:
            return row + 1 if row + 1 < len(self.tokens) else -1
        return next((i for i in range(row + 1, len(self.tokens)) if self.parents[i] == row), -1)

    def path(self, row: int) -> list[int]:
        """Rows from the anchor to ``row``, both included."""
        rows = []
        while row >= 0:
            rows.append(row)
            row = self.parents[row]
        return rows[::-1]

    def leaves(self) -> list[int]:
        """Rows without children, ascending."""
        inner = set(self.parents)
        return [row for row in range(len(self.tokens)) if row not in inner]

    def subtree(self, rows: Sequence[int]) -> TokenTree:
        """The tree of the given rows only, ascending; InvalidTree if a row's parent is not among them."""
        place = {-1: -1}
        for row in rows:
            if self.parents[row] not in place:
                raise InvalidTree(f"row {row} is kept and its parent {self.parents[row]} is not")
            place[row] = len(place) - 1
        return TokenTree([self.tokens[row] for row in rows], [place[self.parents[row]] for row in rows])

    def ancestors(self) -> BoolArray:
        """bool [rows, rows]: entry (i, j) is true where row j is row i or above it. Not to be written to."""
        rows = len(self.tokens)
        if self.is_chain:
            return _LOWER[:rows, :rows]
        mask = np.zeros((rows, rows), np.bool_)
        mask[0, 0] = True
        for row in range(1, rows):
            mask[row] = mask[self.parents[row]]
            mask[row, row] = True
        return mask

    def positions(self, start: int) -> IntArray:
        """int64 [rows]: true positions when the anchor is at ``start``; siblings share one."""
        if self.is_chain:
            return _COUNT[: len(self.tokens)] + start
        return np.array(self.depths, np.int64) + start


def merge(trees: Sequence[TokenTree]) -> tuple[TokenTree, list[list[int]]]:
    """One trie of all ``trees``, which share their anchor, and for each tree the trie row of each of its rows.

    Raises:
        InvalidTree: no tree, different anchors, or more than 256 rows together.
    """
    if not trees:
        raise InvalidTree("nothing to merge: give at least one tree")
    tokens, parents = [trees[0].tokens[0]], [-1]
    children: dict[tuple[int, int], int] = {}
    places: list[list[int]] = []
    for tree in trees:
        if tree.tokens[0] != tokens[0]:
            raise InvalidTree(f"trees with different anchors ({tokens[0]} and {tree.tokens[0]}) cannot be merged")
        place = [0]
        for row in range(1, len(tree.tokens)):
            key = (place[tree.parents[row]], tree.tokens[row])
            if key not in children:
                children[key] = len(tokens)
                tokens.append(key[1])
                parents.append(key[0])
            place.append(children[key])
        places.append(place)
    return TokenTree(tokens, parents), places


def parents_of(ancestors: BoolArray) -> tuple[int, ...]:
    """Parents encoded by an ancestor mask (see :meth:`TokenTree.ancestors`); InvalidTree if it encodes no tree."""
    mask = np.asarray(ancestors)
    if mask.ndim != 2 or mask.shape[0] != mask.shape[1] or mask.shape[0] == 0:
        raise InvalidTree(f"an ancestor mask is square and not empty, this one has shape {mask.shape}")
    depths = mask.sum(axis=1)
    parents = [-1]
    for row in range(len(mask)):
        above = [int(j) for j in np.flatnonzero(mask[row]) if j != row]
        if not mask[row, row]:
            raise InvalidTree(f"row {row} of the mask does not see itself")
        if row == 0:
            continue
        if not above or max(above) > row:
            raise InvalidTree(f"row {row} of the mask sees {above}; it must see the anchor and only rows before it")
        parent = max(above, key=lambda j: int(depths[j]))
        expected = mask[parent].copy()
        expected[row] = True
        if not np.array_equal(mask[row], expected):
            raise InvalidTree(f"row {row} of the mask does not see exactly its parent {parent} and what that sees")
        parents.append(parent)
    if mask[0].sum() != 1:
        raise InvalidTree("the anchor, row 0 of the mask, must see itself only")
    return tuple(parents)


def _checked_depths(tokens: tuple[int, ...], parents: tuple[int, ...], vocab_size: int | None) -> tuple[int, ...]:
    rows = len(tokens)
    if rows == 0:
        raise InvalidTree("a tree has at least one row, the anchor")
    if rows > MAX_ROWS:
        raise InvalidTree(f"a tree of {rows} rows; at most {MAX_ROWS} are possible")
    if len(parents) != rows:
        raise InvalidTree(f"{rows} tokens, but {len(parents)} parents")
    if parents[0] != -1:
        raise InvalidTree(f"row 0 is the anchor and has no parent, but {parents[0]} is given")
    depths = [0] * rows
    seen: set[tuple[int, int]] = set()
    for row in range(1, rows):
        parent, token = parents[row], tokens[row]
        if parent == -1:
            raise InvalidTree(f"row {row} is a second root; only the anchor has no parent")
        if not 0 <= parent < row:
            raise InvalidTree(f"row {row} has parent {parent}; a parent stands before its children")
        if (parent, token) in seen:
            raise InvalidTree(f"row {row} repeats token {token} below row {parent}; siblings must differ")
        seen.add((parent, token))
        depths[row] = depths[parent] + 1
    if max(depths) > MAX_DEPTH:
        raise InvalidTree(f"a tree of depth {max(depths)}; at most {MAX_DEPTH} is possible")
    for row, token in enumerate(tokens):
        if token < 0 or (vocab_size is not None and token >= vocab_size):
            raise InvalidTree(f"row {row} holds token {token}, which is outside the vocabulary of {vocab_size}")
    return tuple(depths)
