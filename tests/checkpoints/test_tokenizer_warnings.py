"""What libraries say about a tokenizer reaches the user, or is acted on."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dspark_export.checkpoints.tokenizer import TokenizerWarning, load_tokenizer
from dspark_export.checkpoints.trust import Trust
from tests import tiny_models

THREES = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+"


def save(folder: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A checkpoint of Mistral as an older transformers left it, without weights."""
    tokenizer.save_pretrained(folder)
    config = tiny_models.config("mistral").to_dict() | {"transformers_version": "4.50.0"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def splitting(pattern: str) -> PreTrainedTokenizerFast:
    """Bytes, and digits in pairs where the rules allow it."""
    alphabet = {letter: place for place, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary = {**alphabet, "12": len(alphabet)}  # transformers looks at vocabularies above 100000 only
    vocabulary |= {f"unused {number}": number for number in range(len(vocabulary), 100_010)}
    made = Tokenizer(models.BPE(vocabulary, [("1", "2")]))
    rules = [
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    made.pre_tokenizer, made.decoder = pre_tokenizers.Sequence(rules), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made)


def test_digits_in_threes_are_corrected(tmp_path: Path) -> None:
    folder = save(tmp_path, splitting(THREES))
    with pytest.warns(TokenizerWarning, match="splits digits in threes"):
        files = load_tokenizer(folder, tiny_models.config("mistral", vocab_size=100_010), "m", Trust.closed())
    assert files.backend.encode("1212").tokens == ["1", "2", "1", "2"]


def test_other_tokenizers_of_the_family_stay_as_they_are(tmp_path: Path) -> None:
    folder = save(tmp_path, tiny_models.byte_fallback_tokenizer())
    before = json.loads((folder / "tokenizer.json").read_text())["pre_tokenizer"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        files = load_tokenizer(folder, tiny_models.config("mistral"), "m", Trust.closed())
    assert json.loads(files.backend.to_str())["pre_tokenizer"] == before


def test_other_words_are_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoTokenizer
    from transformers.utils import logging

    load = AutoTokenizer.from_pretrained

    def talkative(*args: object, **options: object) -> object:
        logging.get_logger("transformers.tokenization").warning("something is odd")
        return load(*args, **options)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", talkative)
    folder = save(tmp_path, tiny_models.tokenizer())
    with pytest.warns(TokenizerWarning, match="the tokenizer of m: something is odd"):
        load_tokenizer(folder, tiny_models.config("mistral"), "m", Trust.closed())
