"""Phrases: what is counted, what grows from it, and that both forms say the same."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_runtime.errors import BackendError, DamagedBundle
from dspark_runtime.phrases.compiled import PhraseForms, phrase_forms
from dspark_runtime.phrases.tables import (
    CENTRES,
    CLASSES,
    MOST_FOLLOWERS,
    ORDERS,
    UNIT,
    Grown,
    PackedPhrases,
    PhraseTable,
    Shape,
    StoredPhrases,
    children,
    context_keys,
    grow,
)
from tests.plugins.cpu.library import built_library

TEXT = st.lists(st.integers(0, 5), min_size=1, max_size=60)
RATES = [centre * 0.8 for centre in CENTRES] * (CLASSES // len(CENTRES))


@pytest.fixture(scope="module")
def both() -> tuple[PhraseForms, PhraseForms]:
    """The plain and the compiled form."""
    return phrase_forms(False), phrase_forms(True, built_library())


def known(table: PhraseTable, ends: Sequence[int]) -> dict[int, int]:
    found = table.find(context_keys(ends, len(ends))[-1])
    return {} if found is None else dict(found[1])


@given(TEXT)
def test_a_context_knows_what_followed_it(text: list[int]) -> None:
    table = PhraseTable(3)
    table.add_text(text)
    for order in (1, 2, 3):
        for end in range(order, len(text)):
            ends = text[end - order : end]
            places = [i for i in range(order, len(text)) if text[i - order : i] == ends]
            expected = {t: UNIT * sum(text[i] == t for i in places) for t in {text[i] for i in places}}
            assert known(table, ends) == expected


def test_longer_contexts_than_asked_for_are_not_kept() -> None:
    table = PhraseTable(2)
    table.add_text([1, 2, 3, 4])
    assert known(table, [2, 3]) == {4: UNIT}
    assert known(table, [1, 2, 3]) == {}


def test_the_weakest_follower_makes_room() -> None:
    table = PhraseTable(1)
    for token in range(MOST_FOLLOWERS):
        table.add([7], ((token, 10 + token),))
    table.add([7], ((99, 1),))
    followers = known(table, [7])
    assert len(followers) == MOST_FOLLOWERS
    assert 0 not in followers
    assert followers[99] == 1
    found = table.find(context_keys([7], 1)[0])
    assert found is not None
    assert found[0] == sum(10 + token for token in range(MOST_FOLLOWERS)) + 1  # what was dropped was seen all the same


@given(st.integers(4, 40), TEXT)
def test_no_more_contexts_than_allowed(most: int, text: list[int]) -> None:
    table = PhraseTable(4, most)
    for place in range(1, len(text)):
        table.add(text[:place], ((text[place], UNIT),))
        assert len(table) <= most
    if len(text) > 1:
        assert known(table, text[-2:-1])  # what came last is known


@given(TEXT, TEXT)
def test_packing_keeps_everything(first: list[int], second: list[int]) -> None:
    table = PhraseTable(4)
    table.add_text(first)
    again = PhraseTable(4)
    again.load(table.packed())
    stored = StoredPhrases(table.packed().checked(6, "a store"))
    for place in range(1, len(second) + 1):
        for key in context_keys(second[:place], 4):
            assert table.find(key) == stored.find(key) == again.find(key)


def test_large_weights_are_packed_to_scale() -> None:
    table = PhraseTable(1)
    table.add([3], ((1, 65_536 * 300), (2, 65_536 * 100)))
    total, followers = StoredPhrases(table.packed()).find(context_keys([3], 1)[0]) or (0, [])
    assert total <= 65_535
    assert dict(followers)[1] / total == pytest.approx(0.75, rel=1e-3)


@given(TEXT)
def test_pruning_leaves_the_likely(text: list[int]) -> None:
    table = PhraseTable(3)
    table.add_text(text)
    for share, most in ((0.0, 2), (0.3, 16), (0.02, 1)):
        whole, pruned = StoredPhrases(table.packed()), StoredPhrases(table.packed().pruned(share, most))
        for place in range(1, len(text)):
            for key in context_keys(text[:place], 3):
                total, followers = whole.find(key) or (0, [])
                best = sorted(followers, key=lambda pair: -pair[1])[:most]
                kept = {token for token, weight in best if weight >= share * total}
                assert {token for token, _ in (pruned.find(key) or (0, []))[1]} == kept


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("keys", np.array([5, 5], np.uint64)),
        ("starts", np.array([0, 2, 1], np.uint32)),
        ("starts", np.array([1, 1, 2], np.uint32)),
        ("tokens", np.array([1, 6], np.uint32)),
        ("tokens", np.array([1], np.uint32)),
        ("weights", np.array([1, 2], np.int64)),
        ("totals", np.array([[1, 2]], np.uint32)),
    ],
)
def test_a_store_that_contradicts_itself_is_refused(name: str, values: np.ndarray) -> None:
    fields = {
        "keys": np.array([3, 5], np.uint64),
        "starts": np.array([0, 1, 2], np.uint32),
        "totals": np.array([1, 2], np.uint32),
        "tokens": np.array([1, 5], np.uint32),
        "weights": np.array([1, 2], np.uint16),
    }
    PackedPhrases(**fields).checked(6, "phrases.npz")
    with pytest.raises(DamagedBundle, match=r"phrases\.npz"):
        PackedPhrases(**fields | {name: values}).checked(6, "phrases.npz")


# Trees ------------------------------------------------------------------------------------------------------------


def test_the_text_itself_outweighs_the_corpus() -> None:
    corpus, text = PhraseTable(4), PhraseTable(6)
    corpus.add_text([1, 2, 3] * 3)
    text.add_text([1, 2, 4])
    assert [token for token, _ in children((StoredPhrases(corpus.packed()), None, text), [1, 2], 8)] == [4, 3]
    assert [token for token, _ in children((StoredPhrases(corpus.packed()), None, None), [1, 2], 8)] == [3]
    assert children((None, None, PhraseTable(6)), [1, 2], 8) == []


@given(TEXT, st.integers(1, 31), st.integers(1, 6), st.integers(1, 4))
def test_a_tree_is_one_and_keeps_its_limits(text: list[int], nodes: int, depth: int, width: int) -> None:
    table = PhraseTable(6)
    table.add_text(text)
    shape = Shape(nodes, depth, width, 0.01)
    tree = grow((None, None, table), RATES, text, shape)
    assert len(tree.tokens) <= nodes
    depths, chances = [0] * len(tree.tokens), [1.0] * len(tree.tokens)
    for row, parent in enumerate(tree.parents):
        assert -1 <= parent < row
        depths[row] = (0 if parent < 0 else depths[parent]) + 1
        chances[row] = (1.0 if parent < 0 else chances[parent]) * RATES[tree.classes[row]]
        assert 0 <= tree.classes[row] < CLASSES
    assert all(level <= depth for level in depths)
    assert all(chance >= 0.01 for chance in chances)
    assert chances == sorted(chances, reverse=True)  # best first
    pairs = list(zip(tree.parents, tree.tokens, strict=True))
    assert len(set(pairs)) == len(pairs)
    assert all(tree.parents.count(parent) <= width for parent in set(tree.parents))


# The compiled form ------------------------------------------------------------------------------------------------

FOLLOWERS = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 300)), max_size=8)
STEPS = st.lists(st.tuples(TEXT, FOLLOWERS), max_size=30)


@settings(deadline=None)
@given(STEPS, STEPS, TEXT, st.integers(6, 200), st.lists(st.floats(0, 1), min_size=CLASSES, max_size=CLASSES), TEXT)
def test_both_forms_agree_to_the_last_bit(
    both: tuple[PhraseForms, PhraseForms],
    corpus: list[tuple[list[int], list[tuple[int, int]]]],
    history: list[tuple[list[int], list[tuple[int, int]]]],
    text: list[int],
    most: int,
    rates: list[float],
    ends: list[int],
) -> None:
    trees: list[list[Grown]] = []
    stores: list[list[PackedPhrases]] = []
    for forms in both:
        tables = [forms.table(orders, limit) for orders, limit in zip(ORDERS, (None, most, None), strict=True)]
        for table, steps in zip(tables, (corpus, history), strict=False):
            for tokens, followers in steps:
                table.add(tokens, followers)
        tables[2].add_text(text)
        again = forms.table(4, most)
        again.load(tables[0].packed())
        stored = forms.stored(tables[0].packed().pruned(0.05, 4))
        shapes = (Shape(31), Shape(8, 3, 2, 0.1))
        trees.append([forms.grow((stored, tables[1], tables[2]), forms.rates(rates), ends, shape) for shape in shapes])
        trees[-1].append(forms.grow((None, again, None), forms.rates(rates), ends, Shape(200, 9, 3, 0.0)))
        stores.append([table.packed() for table in (*tables, again)])
    assert trees[0] == trees[1]
    for plain, compiled in zip(*stores, strict=True):
        for name, _ in PackedPhrases.FIELDS:
            assert np.array_equal(getattr(plain, name), getattr(compiled, name)), name


def test_the_compiled_form_refuses_what_it_cannot_read(both: tuple[PhraseForms, PhraseForms]) -> None:
    forms = both[1]
    with pytest.raises(ValueError, match="rates"):
        forms.grow((None, None, None), forms.rates([0.5]), [1], Shape(8))
    with pytest.raises(ValueError, match="context"):
        forms.grow((None, None, None), forms.rates(RATES), [], Shape(8))
    assert forms.grow((None, None, None), forms.rates(RATES), [1], Shape(8)) == Grown([], [], [])


def test_without_the_library_there_is_the_plain_form() -> None:
    assert phrase_forms().table is PhraseTable
    with pytest.raises(BackendError, match="sequence kernels"):
        phrase_forms(True)
