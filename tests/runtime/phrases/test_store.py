"""What a bundle remembers of its requests: bounded, apart by scope, saved and opened again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dspark_runtime.drafters.base import DraftRequest
from dspark_runtime.drafters.store import StoreDrafter, followers
from dspark_runtime.errors import DamagedBundle, IncompatibleBundle, UsageError
from dspark_runtime.phrases.compiled import PhraseForms, phrase_forms
from dspark_runtime.phrases.store import MOST_SCOPES, PhraseOptions, PhraseStore, read_corpus, write_corpus
from dspark_runtime.phrases.tables import UNIT, PhraseTable
from tests.plugins.cpu.library import built_library

VOCAB = 50
STORY = [7, 1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12]


def drafted(store: PhraseStore, prompt: list[int], scope: str = "") -> list[int]:
    """Tokens proposed behind ``prompt``, in the order of their chance."""
    drafter = StoreDrafter(store)
    drafter.begin(1, prompt)
    draft = drafter.propose([DraftRequest(1, 0, prompt, 31, scope=scope)])[0]
    return [] if draft is None else list(draft.tree.tokens[1:])


def told(store: PhraseStore, text: list[int], scope: str = "", request: int = 1) -> None:
    """A request whose prompt is the first token of ``text``, and whose answer is the rest."""
    drafter = StoreDrafter(store)
    drafter.begin(request, text[:1])
    drafter.propose([DraftRequest(request, 0, text[:1], 31, scope=scope)])
    for place in range(1, len(text)):
        drafter.commit(request, text[place : place + 1])
    drafter.end(request)


@pytest.fixture(params=["plain", "compiled"])
def store(request: pytest.FixtureRequest) -> PhraseStore:
    return new_store(request.param == "compiled")


def forms_of(compiled: bool) -> PhraseForms:
    return phrase_forms(True, built_library()) if compiled else phrase_forms(False)


def new_store(compiled: bool, **options: object) -> PhraseStore:
    forms = forms_of(compiled)
    return PhraseStore(VOCAB, None, PhraseOptions(**options), forms=forms)  # type: ignore[arg-type]


def test_a_request_drafts_from_those_before_it(store: PhraseStore) -> None:
    assert drafted(store, [30, 7]) == []
    told(store, STORY)
    assert drafted(store, [30, 7])[:4] == [1, 2, 3, 4]
    store.forget()
    assert drafted(store, [30, 7]) == []


def test_scopes_do_not_see_each_other() -> None:
    apart, together = new_store(True), new_store(True, shared=True)
    for store in (apart, together):
        told(store, STORY, "alice")
    assert drafted(apart, [7], "bob") == []
    assert drafted(apart, [7], "alice")[:2] == [1, 2]
    assert drafted(together, [7], "bob")[:2] == [1, 2]


def test_nothing_is_remembered_where_it_is_not_wanted() -> None:
    store = new_store(True, history=0)
    told(store, STORY)
    assert store.contexts() == 0
    assert drafted(store, [7]) == []


def test_memory_is_bounded(store: PhraseStore) -> None:
    small = new_store(True, history=100)
    for turn in range(50):
        told(small, [(turn * 7 + k) % VOCAB for k in range(20)])
        assert small.contexts() <= 100
    for turn in range(2 * MOST_SCOPES):
        told(store, STORY, f"key {turn}")
    assert drafted(store, [7], f"key {2 * MOST_SCOPES - 1}")[:2] == [1, 2]
    assert drafted(store, [7], "key 0") == []  # the oldest went


def test_classes_that_are_right_are_learned(store: PhraseStore) -> None:
    told(store, STORY)
    drafter = StoreDrafter(store)
    drafter.begin(2, [7])
    tokens = [7]
    before = {kind: store.rate(kind) for kind in range(3 * 4 * 16)}
    while len(tokens) < len(STORY):
        draft = drafter.propose([DraftRequest(2, 0, tokens, 4)])[0]
        assert draft is not None
        new = STORY[len(tokens) : len(tokens) + 2]
        drafter.commit(2, new)
        tokens += new
    raised = [kind for kind, rate in before.items() if store.rate(kind) > rate]
    assert raised
    assert all(store.rate(kind) >= rate for kind, rate in before.items())  # nothing proposed was wrong


def test_saved_and_opened_again(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "phrases.store"
    for compiled in (True, False):
        store = new_store(compiled, file=path if compiled else None)
        told(store, STORY, "alice")
        told(store, [20, 21, 22, 23], "bob")
        assert store.save(path) == path
        again = PhraseStore(VOCAB, None, PhraseOptions(file=path), forms=forms_of(compiled))
        for scope, prompt in (("alice", [7]), ("bob", [20]), ("alice", [20]), ("", [7])):
            assert drafted(again, prompt, scope) == drafted(store, prompt, scope)
        assert again.contexts() == store.contexts() > 0
        assert sorted(item.name for item in path.parent.iterdir()) == [path.name]
    without = PhraseStore(VOCAB, None, PhraseOptions(history=0, file=path))
    assert drafted(without, [7], "alice") == []


def test_a_file_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "phrases.store"
    store = new_store(True)
    told(store, STORY)
    store.save(path)
    with pytest.raises(IncompatibleBundle, match="another vocabulary"):
        PhraseStore(VOCAB + 1, None, PhraseOptions(file=path))
    with pytest.raises(IncompatibleBundle, match="another vocabulary"):
        PhraseStore(VOCAB, None, PhraseOptions(file=path), tokenizer="another")
    whole = path.read_bytes()
    for damaged in (b"", b"PK", whole[: len(whole) // 2], b"no phrases"):
        path.write_bytes(damaged)
        with pytest.raises(DamagedBundle, match="remove it"):
            PhraseStore(VOCAB, None, PhraseOptions(file=path))
    with pytest.raises(UsageError, match="nowhere"):
        store.save()


def test_a_corpus_is_written_and_read(tmp_path: Path) -> None:
    table = PhraseTable(4)
    table.add_text(STORY)
    path = write_corpus(tmp_path / "corpus.npz", table.packed())
    store = PhraseStore(VOCAB, read_corpus(path, VOCAB))
    assert drafted(store, [7])[:3] == [1, 2, 3]
    assert drafted(store.fresh(), [7])[:3] == [1, 2, 3]
    with pytest.raises(DamagedBundle, match="vocabulary of 5"):
        read_corpus(path, 5)
    np.savez(path.open("wb"), keys=np.zeros(1))
    with pytest.raises(DamagedBundle, match="build the bundle again"):
        read_corpus(path, VOCAB)


@pytest.mark.parametrize("options", [{"history": -1}, {"history": 1.5}, {"file": 3}])
def test_options_outside_their_range(options: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        PhraseOptions(**options)  # type: ignore[arg-type]


def test_a_row_counts_half_for_its_likeliest_token() -> None:
    assert followers(([4], [1.0])) == [(4, UNIT)]
    assert followers(([4, 9, 2], [0.75, 0.25, 0.001])) == [(4, UNIT // 2 + 96), (9, 32)]
