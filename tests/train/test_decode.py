"""Decoding in a batch whose members come and go: the texts and rows of every one are those it has alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from dspark_export.train.decode import Answer, DecodeOptions, Question, decode
from dspark_export.train.features import TappedTarget
from dspark_runtime.speculation.sampling import SamplingParams
from tests import tiny_models

TAPS, TOP = (-1, 0), 8
ARCHITECTURES = ("llama", "gemma3_text", "qwen3_moe", "deepseek_v3", "gpt2")


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny_models.make(request.param)[1].eval()


def questions(vocab: int, *temperatures: float) -> list[Question]:
    random = np.random.default_rng(1)
    lengths = (5, 1, 9, 3, 14, 2, 7)
    return [
        Question(
            tuple(random.integers(0, vocab, n).tolist()),
            SamplingParams(temperature=temperatures[i % len(temperatures)]),
        )
        for i, n in enumerate(lengths)
    ]


def answers(model: PreTrainedModel, asked: list[Question], slots: int, **changes: object) -> dict[Question, Answer]:
    options = DecodeOptions(slots, max_new_tokens=12, ends=(7,), taps=TAPS, top=TOP)
    given = decode(model, asked, DecodeOptions(**(vars(options) | changes)))  # type: ignore[arg-type]
    return {answer.question: answer for answer in given}


def test_greedy_answers_are_those_of_transformers(model: PreTrainedModel) -> None:
    asked = questions(model.config.get_text_config().vocab_size, 0.0)
    for question, answer in answers(model, asked, slots=3).items():
        ids = list(question.prompt)
        for token in answer.tokens:
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0, -1]
            assert logits[token] >= logits.max() - 1e-5
            ids.append(token)
        assert 7 not in answer.tokens[:-1]
        assert len(answer.tokens) == 12 or answer.tokens[-1] == 7


def test_texts_do_not_depend_on_the_batch(model: PreTrainedModel) -> None:
    asked = questions(model.config.get_text_config().vocab_size, 0.0, 1.0)
    alone, together = answers(model, asked, slots=1), answers(model, asked, slots=4)
    assert set(alone) == set(asked)
    assert {q: a.tokens for q, a in alone.items()} == {q: a.tokens for q, a in together.items()}


def test_rows_kept_on_the_way_are_those_of_reading_the_text(model: PreTrainedModel) -> None:
    target = TappedTarget(model, TAPS)
    for question, answer in answers(model, questions(model.config.get_text_config().vocab_size, 0.0, 1.0), 3).items():
        start = len(question.prompt)
        read = target([*question.prompt, *answer.tokens], start, TOP)
        rows = answer.rows
        assert rows is not None and rows.features.shape == read.features.shape
        torch.testing.assert_close(rows.features.float(), read.features.float(), rtol=2e-2, atol=1e-2)  # bfloat16
        torch.testing.assert_close(rows.top_probs[start:].float(), read.top_probs[start:].float(), rtol=2e-3, atol=1e-5)
        assert not rows.top_probs[:start].any() and not read.top_probs[:start].any()
        first = rows.top_ids[start:, 0] == read.top_ids[start:, 0]
        near = rows.top_probs[start:, 0] - rows.top_probs[start:, 1] < 1e-4
        assert bool((first | near).all())
    target.release()


def test_equal_prompts_get_different_texts_and_seeds_repeat() -> None:
    model = tiny_models.make("llama")[1].eval()
    asked = [Question((3, 4), SamplingParams(temperature=1.0), number) for number in range(5)]
    once, again = answers(model, asked, 2, taps=()), answers(model, asked, 5, taps=())
    assert len({answer.tokens for answer in once.values()}) > 3
    assert {q: a.tokens for q, a in once.items()} == {q: a.tokens for q, a in again.items()}
    assert all(answer.rows is None for answer in once.values())
    other = answers(model, asked, 2, taps=(), seed=1)
    assert {q: a.tokens for q, a in other.items()} != {q: a.tokens for q, a in once.items()}


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_models.make("llama")[1].eval()
    before = model.config._attn_implementation
    for _ in decode(model, questions(300, 0.0), DecodeOptions(2, max_new_tokens=3, taps=TAPS)):
        break  # the caller stops listening
    assert model.config._attn_implementation == before
    assert not any(module._forward_hooks for module in model.modules())
