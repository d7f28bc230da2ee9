"""Penalties, biases, guides and log probabilities: the same whatever is drafted."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import RepetitionPenaltyLogitsProcessor, SequenceBiasLogitsProcessor

from dspark_runtime.decoding.choice import TokenChoice
from dspark_runtime.decoding.request import Limits, make_request
from dspark_runtime.drafters.base import Drafter
from dspark_runtime.drafters.ngram import NgramDrafter
from dspark_runtime.drafters.self_draft import SelfDrafter
from dspark_runtime.errors import UsageError
from dspark_runtime.speculation.sampling import SamplingParams
from tests.runtime.conftest import Tiny
from tests.runtime.decoding.test_loop import PROMPTS, WildTrees, full_texts

VOCAB = 40


class Pattern:
    """A guide: each token must have the remainder by 3 that follows from the one before, for ``length`` tokens."""

    def __init__(self, vocab: int, length: int) -> None:
        self.vocab, self.length = vocab, length

    def start(self) -> PatternState:
        return PatternState(self)


class PatternState:
    def __init__(self, pattern: Pattern) -> None:
        self._pattern, self._count, self.moves = pattern, 0, list[int]()

    @property
    def stopped(self) -> bool:
        return self._count == self._pattern.length

    def allowed(self) -> npt.NDArray[np.bool_]:
        return np.arange(self._pattern.vocab) % 3 == self._count % 3

    def advance(self, token: int) -> None:
        assert token % 3 == self._count % 3, "not allowed"
        self._count += 1

    def accepts(self, tokens: Sequence[int]) -> int:
        right = [token % 3 == (self._count + place) % 3 for place, token in enumerate(tokens)]
        return right.index(False) if False in right else len(right)

    def forced(self) -> list[int]:
        return []


SETTINGS = {
    "presence": SamplingParams(presence_penalty=1.5),
    "frequency": SamplingParams(0.7, frequency_penalty=1.2),
    "repetition": SamplingParams(repetition_penalty=1.7),
    "bias": SamplingParams(0.9, top_k=20, logit_bias={3: 4.0, 7: -100.0}),
    "guide": SamplingParams(0.5, guide=Pattern(1000, 15)),
    "all": SamplingParams(
        0.8, presence_penalty=0.5, frequency_penalty=0.4, repetition_penalty=1.1, logit_bias={5: 1}, logprobs=3
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_drafts_change_nothing(tiny: Tiny, name: str) -> None:
    params = SETTINGS[name]
    plain = tiny.generate(PROMPTS, params=params, tokens=24, seed=2)
    assert plain != tiny.generate(PROMPTS, params=SamplingParams(params.temperature), tokens=24, seed=2)
    modes: list[Callable[[], list[Drafter]]] = [
        lambda: [NgramDrafter()],
        lambda: [SelfDrafter(tiny.self_all)],
        lambda: [WildTrees(full_texts(plain, PROMPTS))],
    ]
    for drafters, rows in itertools.product(modes, (1, 3)):
        found = tiny.generate(PROMPTS, drafters(), params=params, tokens=24, seed=2, rows=rows)
        assert [(g.tokens, g.text, g.finish_reason) for g in found] == [
            (g.tokens, g.text, g.finish_reason) for g in plain
        ]
        for one, other in zip(found, plain, strict=True):
            assert [(p.token, [t for t, _ in p.top]) for p in one.logprobs] == [
                (p.token, [t for t, _ in p.top]) for p in other.logprobs
            ]
            np.testing.assert_allclose(
                [p.logprob for p in one.logprobs], [p.logprob for p in other.logprobs], atol=1e-4
            )
    assert sum(g.stats.accepted for g in found) > 0  # the last mode knows the text


def test_a_guide_ends_the_text(tiny: Tiny) -> None:
    generation = tiny.generate([PROMPTS[0]], params=SETTINGS["guide"], tokens=40)[0]
    assert generation.finish_reason == "stop" and len(generation.tokens) == 15
    assert [token % 3 for token in generation.tokens] == [place % 3 for place in range(15)]


class Spelled(Pattern):
    """A guide whose every third token is free, and the two after it are given."""

    def start(self) -> SpelledState:
        return SpelledState(self)


class SpelledState(PatternState):
    def _given(self, place: int) -> int | None:
        return None if place % 3 == 0 else 3 * place + 1

    def allowed(self) -> npt.NDArray[np.bool_]:
        given = self._given(self._count)
        return np.ones(384, np.bool_) if given is None else np.arange(384) == given

    def advance(self, token: int) -> None:
        assert self.allowed()[token], "not allowed"
        self._count += 1

    def accepts(self, tokens: Sequence[int]) -> int:
        for place, token in enumerate(tokens):
            if self._given(self._count + place) not in (None, token):
                return place
        return len(tokens)

    def forced(self) -> list[int]:
        found = []
        while (given := self._given(self._count + len(found))) is not None:
            found.append(given)
        return found


def test_what_a_guide_forces_is_drafted_and_what_it_forbids_is_not(tiny: Tiny) -> None:
    params = SamplingParams(0.9, guide=Spelled(384, 30))
    plain = tiny.generate(PROMPTS[:2], params=params, tokens=40)
    assert not any(g.stats.verified for g in plain)
    free = tiny.generate(PROMPTS[:2], tokens=40)
    for drafters, rows in itertools.product(([NgramDrafter()], [WildTrees(full_texts(free, PROMPTS[:2]))]), (1, 2)):
        found = tiny.generate(PROMPTS[:2], drafters, params=params, tokens=40, rows=rows)
        assert [(g.tokens, g.finish_reason) for g in found] == [(g.tokens, g.finish_reason) for g in plain]
        for generation in found:
            counts = generation.stats.per_drafter["grammar"]
            assert counts.accepted == counts.drafted > 10
            assert generation.stats.rounds <= 16  # of 30 tokens, every third is free


def test_log_probabilities_are_those_of_the_model(tiny: Tiny) -> None:
    """They are of the text so far without temperature, bias or penalties: a plain pass over the text gives them."""
    params = SamplingParams(1.3, top_k=5, presence_penalty=2, logprobs=4)
    (generation,) = tiny.generate([PROMPTS[0]], [NgramDrafter()], params=params, tokens=20)
    text = [*PROMPTS[0], *generation.tokens]
    assert [p.token for p in generation.logprobs] == generation.tokens
    for place, found in enumerate(generation.logprobs):
        prefix = text[: len(PROMPTS[0]) + place]
        (one,) = tiny.generate([prefix], params=SamplingParams(logprobs=4), tokens=1)
        (reference,) = one.logprobs
        assert [token for token, _ in found.top] == [token for token, _ in reference.top]
        np.testing.assert_allclose([v for _, v in found.top], [v for _, v in reference.top], atol=1e-4)
        assert found.logprob <= found.top[0][1] + 1e-12 and one.tokens == [found.top[0][0]]


@settings(max_examples=150)
@given(st.data())
def test_adjustments_are_the_published_ones(data: st.DataObject) -> None:
    """Against transformers' own processors, and OpenAI's formula for the penalties it documents."""
    prompt = data.draw(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=6))
    text = data.draw(st.lists(st.integers(0, VOCAB - 1), max_size=8))
    bias = data.draw(st.dictionaries(st.integers(0, VOCAB - 1), st.integers(-8, 8), max_size=4))
    penalty = data.draw(st.sampled_from([0.5, 1.0, 1.3, 2.0]))
    presence, frequency = data.draw(st.sampled_from([0.0, 0.7, -1.0])), data.draw(st.sampled_from([0.0, 0.4, 2.0]))
    params = SamplingParams(
        presence_penalty=presence, frequency_penalty=frequency, repetition_penalty=penalty, logit_bias=bias
    )
    rows = np.random.default_rng(data.draw(st.integers(0, 99))).normal(0, 2, (len(text) + 1, VOCAB))
    logits = rows.astype(np.float32)
    choice = TokenChoice(make_request(prompt, Limits(VOCAB, 64), params=params))
    for place, token in enumerate(text):  # a bias so large that the token is drawn
        logits[place, token] = 1e4
        assert choice.draw(logits[place], len(prompt) + place) == token or choice.adjusted
    so_far = [*prompt, *_drawn(choice)]
    expected = torch.tensor(logits[-1:])
    if bias:
        expected = SequenceBiasLogitsProcessor([[[t], float(v)] for t, v in bias.items()])(
            torch.tensor([so_far]), expected
        )
    if penalty != 1:
        expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([so_far]), expected)
    counts = np.bincount(np.array(_drawn(choice), np.int64), minlength=VOCAB)
    wanted = expected[0].numpy() - frequency * counts - presence * (counts > 0)
    np.testing.assert_allclose(choice._adjust(logits[-1]), wanted, rtol=1e-5, atol=1e-5)


def _drawn(choice: TokenChoice) -> list[int]:
    return sorted(choice._counts.elements())


class Dead(Pattern):
    """Lets ``length`` tokens come, and then none, though it is not complete."""

    def start(self) -> PatternState:
        class Nothing(PatternState):
            @property
            def stopped(self) -> bool:
                return False

            def allowed(self) -> npt.NDArray[np.bool_]:
                return super().allowed() & (self._count < self._pattern.length)

        return Nothing(self)


@pytest.mark.parametrize("fixed", [0, 3])
def test_a_dead_end_ends_its_text_and_no_other(tiny: Tiny, fixed: int) -> None:
    params = [SamplingParams(guide=Dead(1000, 5)), SamplingParams(guide=Dead(1000, 1)), SamplingParams()]
    plain = tiny.generate(PROMPTS[:3], params=params, tokens=9)
    drafters = [WildTrees(full_texts(plain, PROMPTS[:3]))] if fixed else []
    dead, at_once, free = tiny.generate(PROMPTS[:3], drafters, params=params, tokens=9, fixed=fixed)
    assert (len(dead.tokens), dead.finish_reason) == (5, "dead_end")
    assert [token % 3 for token in dead.tokens] == [0, 1, 2, 0, 1]
    assert (len(at_once.tokens), at_once.finish_reason) == (1, "dead_end")
    assert (len(free.tokens), free.finish_reason) == (9, "length")


def test_a_guide_without_a_beginning_is_refused(tiny: Tiny) -> None:
    with pytest.raises(UsageError, match="no token to begin with"):
        tiny.generate([PROMPTS[0]], params=SamplingParams(guide=Dead(1000, 0)), tokens=5)


@pytest.mark.parametrize(
    "wrong",
    [
        {"presence_penalty": 2.1},
        {"frequency_penalty": -3},
        {"repetition_penalty": 0},
        {"repetition_penalty": 5e-324},
        {"repetition_penalty": float("nan")},
        {"logit_bias": {1: 101}},
        {"logit_bias": {-1: 1}},
        {"logit_bias": {"a": 1}},
        {"logit_bias": 5},
        {"logit_bias": dict.fromkeys(range(301), 1)},
        {"logprobs": 21},
        {"logprobs": True},
        {"guide": "[0-9]+"},
    ],
    ids=str,
)
def test_what_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        SamplingParams(**wrong)  # type: ignore[arg-type]


def test_a_bias_beyond_the_vocabulary_is_refused() -> None:
    with pytest.raises(UsageError, match="vocabulary has 40"):
        make_request([1], Limits(VOCAB, 64), params=SamplingParams(logit_bias={VOCAB: 1}))


def test_a_request_has_a_length_a_seed_and_stops_of_its_own(tiny: Tiny) -> None:
    own = [SamplingParams(1.0, seed=7, max_new_tokens=3), SamplingParams(1.0, stop=["x"]), SamplingParams(1.0)]
    limits = Limits(tiny.vocab_size, tiny.positions)
    requests = [make_request([1, 2], limits, max_new_tokens=9, params=params, seed=1, stop="y") for params in own]
    assert [request.max_new_tokens for request in requests] == [3, 9, 9]
    assert [request.seed for request in requests] == [7, 1, 1]
    assert [request.stops for request in requests] == [("y",), ("x",), ("y",)]
