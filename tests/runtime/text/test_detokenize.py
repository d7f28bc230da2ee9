"""Streaming text: whole characters, stop strings, and the same text as decoding at once."""

from __future__ import annotations

import random

import pytest
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
