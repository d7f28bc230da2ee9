"""The corpus of a bundle: what the target says, counted, written into the bundle, and drafted from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from dspark_export.build.options import BuildOptions
from dspark_export.build.phrases import (
    CORPUS_FILE,
    OWN,
    Told,
    accepted_length,
    add_corpus,
    answered_texts,
    corpus_of,
    given_texts,
    known_corpus,
    own_texts,
)
from dspark_export.cli.main import app
from dspark_export.prompts.texts import encode
from dspark_runtime import Bundle
from dspark_runtime.bundle.files import BundleFiles
from dspark_runtime.errors import DamagedBundle, UsageError
from dspark_runtime.phrases.store import PhraseStore
from dspark_runtime.phrases.tables import UNIT, PackedPhrases
from tests.shared.bundles import built_llama

PROMPTS = ["one", "a longer one", "why", "sum of seven"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built_llama(tmp_path_factory.mktemp("phrases"))


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copied.dspark"))


def same(left: PackedPhrases, right: PackedPhrases) -> bool:
    return all(np.array_equal(getattr(left, name), getattr(right, name)) for name, _ in PackedPhrases.FIELDS)


def test_the_target_s_own_texts_are_what_it_says(folder: Path) -> None:
    bundle = Bundle.open(folder, threads=1)
    texts = own_texts(bundle, 4, seed=2)
    assert 1 < len(texts) <= 4
    for number, told in enumerate(texts):
        assert len(told.followers) == len(told.tokens) - told.start > 0
        if number % 2 == 0:  # greedy ones
            prompt, said = list(told.tokens[: told.start]), list(told.tokens[told.start :])
            assert bundle.generate(prompt, max_new_tokens=len(said), speculate="off").tokens == said
        for token, weights in zip(told.tokens[told.start :], told.followers, strict=True):
            assert UNIT // 2 <= sum(weight for _, weight in weights) <= UNIT + 8
            best = max(weights, key=lambda pair: pair[1])[0]
            assert best == token or number % 2


def test_a_seed_gives_one_corpus(folder: Path) -> None:
    bundle = Bundle.open(folder, threads=1)
    made = [corpus_of(own_texts(bundle, 4, seed=seed), 400, OWN).packed for seed in (2, 2, 3)]
    assert same(made[0], made[1]) and not same(made[0], made[2])


def test_answers_to_the_user_s_prompts_are_drafted_from(copied: Path) -> None:
    bundle = Bundle.open(copied, threads=1)
    before = bundle.generate(encode(bundle, PROMPTS[0]), max_new_tokens=60, speculate="store", ignore_eos=True)
    made = corpus_of(answered_texts(bundle, PROMPTS), bundle.manifest.model.vocab_size, "mine.txt")
    manifest = add_corpus(copied, made)
    assert [entry.kind for entry in manifest.drafters][:2] == ["ngram", "store"]
    again = Bundle.open(copied, threads=1)
    after = again.generate(encode(bundle, PROMPTS[0]), max_new_tokens=60, speculate="store", ignore_eos=True)
    assert after.tokens == before.tokens
    texts = answered_texts(bundle, PROMPTS)
    vocab = bundle.manifest.model.vocab_size
    assert accepted_length(PhraseStore(vocab, made.packed), texts) > accepted_length(PhraseStore(vocab), texts)


def test_more_phrases_come_on_top(copied: Path) -> None:
    bundle = Bundle.open(copied, threads=1)
    vocab = bundle.manifest.model.vocab_size
    first = corpus_of(given_texts(bundle, [("a", "b c d e f")]), vocab, "log.jsonl")
    add_corpus(copied, first)
    known = known_corpus(BundleFiles.open(copied))
    assert known is not None and same(known.packed, first.packed) and known.facts == first.facts
    second = corpus_of(given_texts(bundle, [("g", "h i j k")]), vocab, "more.jsonl", known)
    assert set(first.packed.keys.tolist()) < set(second.packed.keys.tolist())
    assert second.facts.texts == 2 and second.facts.origin == "log.jsonl, more.jsonl"


def test_a_damaged_corpus_is_noticed(copied: Path) -> None:
    bundle = Bundle.open(copied, threads=1)
    add_corpus(copied, corpus_of(given_texts(bundle, [("a", "b c d")]), bundle.manifest.model.vocab_size, "log"))
    path = copied / CORPUS_FILE
    path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(DamagedBundle):
        Bundle.open(copied)
    with pytest.raises(DamagedBundle, match="holds no phrases"):
        Bundle.open(copied, verify_digests=False)


def test_nothing_to_make_phrases_of() -> None:
    with pytest.raises(UsageError, match="prompts or responses"):
        corpus_of([], 10, OWN)
    with pytest.raises(UsageError, match="negative"):
        BuildOptions(model="m", out=Path("m"), phrases=-1)


def test_a_text_that_is_known_needs_fewer_rounds() -> None:
    told = Told(tuple(range(30)), 1, tuple(((token, UNIT),) for token in range(1, 30)))
    made = corpus_of([told], 30, "a text")
    assert accepted_length(PhraseStore(30), [told]) == 1.0
    assert accepted_length(PhraseStore(30, made.packed), [told]) > 3
    assert made.gain is None  # one text leaves none to hold out


def test_the_command_adds_prompts_and_logs(copied: Path, tmp_path: Path) -> None:
    prompts, log = tmp_path / "mine.txt", tmp_path / "log.jsonl"
    prompts.write_text("\n".join(PROMPTS))
    log.write_text(json.dumps({"prompt": "why", "response": "one two three"}) + "\n")
    command = ["phrases", str(copied), "--prompts", str(prompts), "--responses", str(log), "--threads", "1"]
    shown = CliRunner().invoke(app, command)
    assert shown.exit_code == 0, shown.output
    assert "5 texts" in shown.stdout and "mine.txt, log.jsonl" in shown.stdout and "held out" in shown.stdout
    asked = CliRunner().invoke(app, [*command, "--replace", "--own", "2", "--json"])
    assert asked.exit_code == 0, asked.output
    summary = json.loads(asked.stdout)
    assert 5 < summary["texts"] <= 7 and summary["origin"].startswith(OWN) and summary["gain"]["with_corpus"] > 0
    assert Bundle.open(copied).manifest.drafters[1].phrases is not None
    listed = CliRunner().invoke(app, ["inspect", str(copied)], env={"COLUMNS": "200"})
    assert f"{summary['contexts']} contexts of {summary['tokens']} tokens, prompts: {OWN}" in listed.stdout


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "give --prompts"),
        (["--responses", "{log}"], "no text `response`"),
        (["--prompts", "{none}"], "cannot read the prompts"),
    ],
)
def test_the_command_refuses(copied: Path, tmp_path: Path, options: list[str], says: str) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text(json.dumps({"prompt": "why"}) + "\n")
    given = [option.format(log=log, none=tmp_path / "none.txt") for option in options]
    shown = CliRunner().invoke(app, ["phrases", str(copied), *given])
    assert shown.exit_code == 2
    assert says in shown.stderr
    assert known_corpus(BundleFiles.open(copied)) is None
