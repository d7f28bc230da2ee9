"""A bundle writes prompts and answers many at once; every text is the one that it writes alone."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import pytest

from dspark_export.prompts.answers import answer, opening, self_prompts
from dspark_export.prompts.texts import encode
from dspark_runtime import Bundle, SamplingParams
from dspark_runtime.errors import CapacityError, UsageError
from tests.shared.bundles import built_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built_llama(tmp_path_factory.mktemp("answers"))


@pytest.fixture(scope="module")
def bundle(folder: Path) -> Bundle:
    return Bundle.open(folder, threads=1)


def test_answers_are_those_of_single_calls(bundle: Bundle) -> None:
    prompts = [encode(bundle, text) for text in ("a", "a longer one than that", "why", "sum of seven", "map", "x y z")]
    params = [SamplingParams(temperature=0.7 * (number % 2)) for number in range(len(prompts))]
    given = list(answer(bundle, prompts, params, max_new_tokens=20, seed=5, rows=2))
    assert [item.prompt for item in given] == [tuple(prompt) for prompt in prompts]
    for item, prompt, own in zip(given, prompts, params, strict=True):
        alone = bundle.generate(prompt, own, max_new_tokens=20, seed=5, speculate="off")
        assert item.response == tuple(alone.tokens) and item.temperature == own.temperature


def test_equal_prompts_get_different_answers_and_seeds_repeat(bundle: Bundle) -> None:
    prompts, params = [encode(bundle, "again")] * 6, SamplingParams(temperature=1.0)
    once, again, other = (
        [item.response for item in answer(bundle, prompts, params, max_new_tokens=12, seed=seed, rows=rows)]
        for seed, rows in ((0, 4), (0, 2), (1, 4))
    )
    assert once == again and once != other and len(set(once)) > 3


def test_own_prompts_are_numbered(bundle: Bundle) -> None:
    """Prompt n is the same in every run, whatever was asked for beside it."""
    whole = list(self_prompts(bundle, 7, seed=3, max_new_tokens=10, rows=3))
    assert list(self_prompts(bundle, 7, seed=3, first=4, max_new_tokens=10, rows=2)) == whole[4:]
    assert len(whole) == 7 and len(set(whole)) > 4
    assert list(self_prompts(bundle, 7, seed=4, max_new_tokens=10)) != whole
    assert list(self_prompts(bundle, 3, first=3)) == []


def test_the_model_asks_where_its_template_has_the_user_begin(bundle: Bundle) -> None:
    assert encode(bundle, "question")[: len(opening(bundle.codec))] == opening(bundle.codec)
    assert bundle.codec.tokenizer.decode(opening(bundle.codec), skip_special_tokens=False).endswith("<|user|>")


def test_a_model_without_a_template_begins_a_text(folder: Path, tmp_path: Path) -> None:
    """After the token that ends texts, as this tokenizer puts none before them."""
    plain = tmp_path / "plain"
    shutil.copytree(folder, plain)
    (plain / "tokenizer" / "chat_template.jinja").unlink()
    manifest = json.loads((plain / "manifest.json").read_text())
    del manifest["files"]["tokenizer/chat_template.jinja"]
    (plain / "manifest.json").write_text(json.dumps(manifest))
    opened = Bundle.open(plain, threads=1)
    assert opening(opened.codec) == []
    ends = opened.manifest.model.eos_token_ids
    expected = opened.generate([*ends[:1]], max_new_tokens=10, temperature=1.0, top_p=0.95, seed=3, speculate="off")
    (said,) = self_prompts(opened, 1, seed=3, max_new_tokens=10)
    assert said == expected.text.strip() and len(said) > 5


def test_a_bundle_that_cannot_serve_exactly_writes_all_the_same(folder: Path, tmp_path: Path) -> None:
    """On operators whose rows disturb each other, an exact service is refused; prompts and answers need none."""
    noisy = tmp_path / "noisy"
    shutil.copytree(folder, noisy)
    manifest = json.loads((noisy / "manifest.json").read_text())
    manifest["precision"]["row_noise"]["between_batches"] = 0.5
    (noisy / "manifest.json").write_text(json.dumps(manifest))
    opened = Bundle.open(noisy, threads=1, exact=True)
    with pytest.raises(UsageError, match="exact service"):
        opened.serve()
    given = list(answer(opened, [[5, 6], [7]], max_new_tokens=5, rows=2))
    assert [item.prompt for item in given] == [(5, 6), (7,)] and all(len(item.response) > 0 for item in given)
    assert opened.phrases.contexts() > 0  # what was written is remembered where the caller looks for it
    with pytest.raises(UsageError, match="nonsense"):
        list(answer(opened, [[5]], speculate="nonsense"))


def test_what_does_not_fit_is_refused(bundle: Bundle) -> None:
    with pytest.raises(UsageError, match="2 settings for 1 prompts"):
        list(answer(bundle, [[5]], [SamplingParams(), SamplingParams()]))
    with pytest.raises(CapacityError):
        list(answer(bundle, [[5] * (bundle.limits.positions + 1)]))
    (one,) = answer(bundle, [[5] * (bundle.limits.positions - 3)], max_new_tokens=50)
    assert 1 <= len(one.response) <= 3


def test_a_caller_who_stops_listening_leaves_no_service_behind(bundle: Bundle) -> None:
    before = threading.active_count()
    answers = answer(bundle, [[number + 3] for number in range(40)], max_new_tokens=30, rows=2)
    next(answers)
    answers.close()
    assert threading.active_count() == before
