"""Streaming text: whole characters, stop strings, and the same text as decoding at once."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from dspark_runtime.text.stream import TextStream
from tests import tiny_models

TEXTS = [
    "Gr\u00fc\u00dfe, \u4e16\u754c! \U0001f469\u200d\U0001f469\u200d\U0001f467 na\u00efve \u2014 caf\u00e9",
    "plain ascii text, nothing else",
    "\U0001d518\U0001d52b\U0001d526 \u27e8x\u27e9 \u2713",
    "\n\n  \t x",
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    made: Tokenizer = tiny_models.tokenizer().backend_tokenizer
    return made


KINDS = {
    "bytes": tiny_models.tokenizer().backend_tokenizer,
    "byte fallback": tiny_models.byte_fallback_tokenizer().backend_tokenizer,
}
FALLBACK = KINDS["byte fallback"]
BYTE, LETTER, SPACE = 3, 260, 259  # ids of byte 0, "a" and a space in the vocabulary of FALLBACK


def fallback_ids(text: str | bytes) -> list[int]:
    """Letters as letters, everything else as its bytes."""
    raw = text.encode() if isinstance(text, str) else text
    return [byte - ord("a") + LETTER if chr(byte) in "abcdefghijklmnopqrstuvwxyz" else BYTE + byte for byte in raw]


def stream(tokenizer: Tokenizer, ids: list[int], stops: tuple[str, ...] = ()) -> tuple[list[str], int]:
    """Pieces given out, and the number of tokens used."""
    text, pieces = TextStream(tokenizer, [], stops), []
    for count, token in enumerate(ids, 1):
        pieces.append(text.push(token))
        if text.stopped:
            return pieces, count
    pieces.append(text.finish())
    return pieces, len(ids)


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_add_up_and_hold_whole_characters(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text).ids
    assert len(ids) > len(text) / 2  # the tiny vocabulary splits characters
    pieces, _ = stream(tokenizer, ids)
    assert "".join(pieces) == text
    assert not any("�" in piece for piece in pieces)


def test_an_unfinished_character_appears_at_the_end_only(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("ab👩").ids[:-1]
    pieces, _ = stream(tokenizer, ids)
    assert "".join(pieces[:-1]) == "ab"
    assert set(pieces[-1]) == {"�"}


def test_random_tokens_give_what_decoding_at_once_gives(tokenizer: Tokenizer) -> None:
    rng = random.Random(0)
    for _ in range(200):
        ids = [rng.randrange(3, tiny_models.VOCAB) for _ in range(30)]
        assert "".join(stream(tokenizer, ids)[0]) == tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("one two three", ("two",), "one "),
        ("one two three", ("zzz",), "one two three"),
        ("one two three", ("three", "two th"), "one "),
        ("aaab", ("aab",), "a"),
        ("xENDx", ("EN", "END"), "x"),
        ("almost EN", ("END",), "almost EN"),
        ("👩 stop", ("👩",), ""),
        ("a\n\nb", ("\n\n",), "a"),
        ("stop", ("stop",), ""),
    ],
)
def test_stop_strings(tokenizer: Tokenizer, text: str, stops: tuple[str, ...], expected: str) -> None:
    ids = tokenizer.encode(text).ids
    pieces, used = stream(tokenizer, ids, stops)
    assert "".join(pieces) == expected
    if expected != text:
        full = tokenizer.decode(ids[:used], skip_special_tokens=True)
        assert any(stop in full for stop in stops)
        assert not any(stop in tokenizer.decode(ids[: used - 1], skip_special_tokens=True) for stop in stops)


def test_the_start_of_a_stop_string_is_held_back(tokenizer: Tokenizer) -> None:
    text, given = TextStream(tokenizer, [], ("<<END>>",)), ""
    for token in tokenizer.encode("hi <<EN").ids:
        given += text.push(token)
        assert "<" not in given
    assert given == "hi "
    assert text.finish() == "<<EN"


def test_special_tokens_give_no_text(tokenizer: Tokenizer) -> None:
    ids = [tiny_models.BOS, *tokenizer.encode("hi").ids, tiny_models.EOS]
    assert "".join(stream(tokenizer, ids)[0]) == "hi"


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_any_tokens_after_any_prompt_give_what_decoding_at_once_gives(kind: str, data: st.DataObject) -> None:
    tokenizer = KINDS[kind]
    ids = st.integers(0, tokenizer.get_vocab_size() + 5) | st.integers(BYTE + 0x80, BYTE + 0xFF)
    prompt, tokens = data.draw(st.lists(ids, max_size=12)), data.draw(st.lists(ids, max_size=40))
    text = TextStream(tokenizer, prompt)
    pieces = [*map(text.push, tokens), text.finish()]
    at_once = tokenizer.decode(tokens, skip_special_tokens=True)
    assert "".join(pieces).removeprefix(" ") == at_once.removeprefix(" ")  # without a prompt, a first space is dropped


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (fallback_ids("ab\u00e9c"), ["a", "b", "\u00e9c"]),
        (fallback_ids(b"a\xc3\xa9\xffb"), ["a", "\ufffd\ufffd\ufffdb"]),  # the run is invalid, every byte of it
        (fallback_ids(b"a\xff"), ["a", "\ufffd"]),
        ([*fallback_ids(b"a\xc3"), 2, *fallback_ids(b"\xa9b")], ["a", "\u00e9b"]),  # special tokens have no text
        ([*fallback_ids("\U0001f642 "), SPACE, *fallback_ids("x")], ["\U0001f642  ", "x"]),
        (fallback_ids("\U0001f642"), ["\U0001f642"]),
    ],
)
def test_runs_of_bytes(ids: list[int], expected: list[str]) -> None:
    assert [piece for piece in stream(FALLBACK, ids)[0] if piece] == expected
    assert "".join(expected) == FALLBACK.decode(ids)


def test_a_prompt_that_ends_in_bytes_does_not_lose_the_text() -> None:
    """An invalid byte after a whole character of the prompt, and the rest of a character the prompt began."""
    for prompt, tokens, expected in [
        (fallback_ids("a \U0001f642"), [BYTE + 0xFF, LETTER], "\ufffda"),
        (fallback_ids(b"a \xf0\x9f\x99"), [BYTE + 0x82, LETTER], "\ufffda"),
        ([], [BYTE + 0xFF, LETTER], "\ufffda"),
    ]:
        text = TextStream(FALLBACK, prompt)
        assert "".join(map(text.push, tokens)) + text.finish() == expected


def test_endless_bytes_are_given_out() -> None:
    text = TextStream(FALLBACK, [])
    pieces = [text.push(token) for token in fallback_ids("\u00e9" * 1000)]
    assert max(map(len, pieces)) < 200
    assert "".join(pieces) + text.finish() == "\u00e9" * 1000


@pytest.mark.parametrize("stop", ["\u00e9", "\u00e9b"])
def test_stop_strings_in_bytes(stop: str) -> None:
    pieces, _ = stream(FALLBACK, fallback_ids("a\u00e9bc"), (stop,))
    assert "".join(pieces) == "a"
