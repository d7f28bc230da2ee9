"""Prompt lookup."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dspark_runtime.drafters.base import DraftRequest
from dspark_runtime.drafters.ngram import NgramDrafter, NgramIndex

TEXT = st.lists(st.integers(0, 3), min_size=1, max_size=60)


def naive(tokens: list[int], longest: int, most: int = 32) -> tuple[int, int] | None:
    """Longest agreement (up to ``most``) of an earlier place with the end; the latest among equals."""
    best = None
    for place in range(len(tokens) - 1):
        length = 0
        while length <= min(place, most - 1) and tokens[place - length] == tokens[-1 - length]:
            length += 1
        if length and (best is None or (length, place) >= best):
            best = (length, place)
    return best


@given(TEXT)
def test_the_index_finds_the_longest_agreement(tokens: list[int]) -> None:
    index = NgramIndex()
    index.extend(tokens)
    found = index.matches()
    expected = naive(tokens, 4)
    assert (found[0] if found else None) == expected or (
        # More than eight occurrences of the longest indexed n-gram: only the latest eight are compared.
        expected is not None and found[0][0] <= expected[0] and len(tokens) > 12
    )
    for agreement, place in found:
        assert tokens[place + 1 - agreement : place + 1] == tokens[len(tokens) - agreement :]


@given(TEXT, st.integers(1, 5))
def test_growing_in_steps_changes_nothing(tokens: list[int], step: int) -> None:
    whole, parts = NgramIndex(), NgramIndex()
    whole.extend(tokens)
    for start in range(0, len(tokens), step):
        parts.extend(tokens[start : start + step])
    assert parts.matches() == whole.matches()


def propose(tokens: list[int], limit: int = 6, **options: bool) -> tuple[list[list[int]], list[object]]:
    drafter = NgramDrafter(**options)
    drafter.begin(1, tokens[:3])
    drafter.commit(1, tokens[3:])
    draft = drafter.propose([DraftRequest(1, 0, tokens, limit)])[0]
    if draft is None:
        return [], []
    assert draft.tree.tokens[0] == tokens[-1]
    assert len(draft.classes) == len(draft.tree) - 1
    paths = [[draft.tree.tokens[row] for row in draft.tree.path(leaf)][1:] for leaf in draft.tree.leaves()]
    drafter.end(1)
    return paths, list(draft.classes)


def test_proposals() -> None:
    assert propose([1, 2, 3, 4, 5, 9, 1, 2, 3]) == (
        [[4, 5, 9, 1, 2, 3]],
        [(3, 0, 0)] + [(n, 0, 1) for n in (4, 5, 5, 6, 6)],
    )
    assert propose([1, 2, 3, 4])[0] == []
    assert propose([7, 7, 7], 5)[0] == [[7] * 5], "a period goes on beyond the end of the text"
    assert propose([8, 1, 2, 1, 2, 1], 4)[0] == [[2, 1, 2, 1]]
    assert propose([1, 2, 3], 0)[0] == []


def test_disagreeing_occurrences_give_a_second_branch() -> None:
    text = [1, 2, 3, 50, 60, 1, 2, 3, 70, 80, 1, 2, 3]
    paths, classes = propose(text, 4)
    assert paths == [[70, 80, 1, 2], [50, 60, 1, 2]]
    assert classes[0] == (3, 2, 0)
    assert classes[4] == (3, 2, 2)
    assert propose(text, 4, branches=False)[0] == [[70, 80, 1, 2]]
    drafter = NgramDrafter()
    assert drafter.prior(classes[0]) > drafter.prior(classes[4])
