"""Requests outside their range: a typed error each, before anything runs."""

from __future__ import annotations

from typing import Any

import pytest

from dspark_runtime.decoding.request import DEFAULT_NEW_TOKENS, Limits, make_requests
from dspark_runtime.errors import CapacityError, UsageError
from dspark_runtime.speculation.sampling import SamplingParams

LIMITS = Limits(vocab_size=100, positions=512)
NAN, INF = float("nan"), float("inf")


def one(prompt: Any = (1, 2, 3), **options: Any) -> Any:
    return make_requests([prompt], LIMITS, **options)[0]


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"prompt": []}, UsageError, "the prompt is empty"),
        ({"prompt": [1, 100]}, UsageError, "token 1 is 100, outside the vocabulary"),
        ({"prompt": [-1]}, UsageError, "outside the vocabulary"),
        ({"prompt": [1, "2"]}, UsageError, "not a token id"),
        ({"prompt": [1.0]}, UsageError, "not a token id"),
        ({"prompt": [True]}, UsageError, "not a token id"),
        ({"prompt": [1] * 512}, CapacityError, "512 tokens and the limit is 512"),
        ({"prompt": [1] * 511, "max_new_tokens": 2}, CapacityError, "ask for at most 1"),
        ({"max_new_tokens": 0}, UsageError, "at least 1"),
        ({"max_new_tokens": -3}, UsageError, "at least 1"),
        ({"max_new_tokens": True}, UsageError, "at least 1"),
        ({"max_new_tokens": 2.0}, UsageError, "at least 1"),
        ({"max_new_tokens": 10**15}, CapacityError, "ask for at most 509"),
        ({"seed": -1}, UsageError, "seed=-1"),
        ({"seed": 2**64}, UsageError, "2\\*\\*64 - 1"),
        ({"seed": 1.5}, UsageError, "seed=1.5"),
        ({"seed": None}, UsageError, "seed=None"),
        ({"stop": [""]}, UsageError, "non-empty"),
        ({"stop": ["a", 3]}, UsageError, "non-empty"),
        ({"stop": ["x"] * 17}, UsageError, "at most 16"),
        ({"stop": "x" * 1001}, UsageError, "at most 1000"),
    ],
)
def test_bad_requests(options: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        one(options.pop("prompt", (1, 2, 3)), **options)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"temperature": -0.1}, "negative"),
        ({"temperature": INF}, "not a finite number"),
        ({"temperature": NAN}, "not a finite number"),
        ({"temperature": "hot"}, "not a finite number"),
        ({"temperature": True}, "not a finite number"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.0001}, "top_p=1.0001"),
        ({"top_p": -1}, "top_p=-1"),
        ({"top_p": NAN}, "not a finite number"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_k": 1.5}, "top_k=1.5"),
        ({"top_k": 101}, "the vocabulary has 100"),
        ({"min_p": -0.1}, "min_p=-0.1"),
        ({"min_p": 1.1}, "min_p=1.1"),
    ],
)
def test_bad_sampling(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        one(params=SamplingParams(**options))


def test_no_prompts() -> None:
    with pytest.raises(UsageError, match="there is no prompt"):
        make_requests([], LIMITS)


def test_the_edges_of_the_ranges_are_allowed() -> None:
    assert one([1] * 511).max_new_tokens == 1
    assert one([1] * 511, max_new_tokens=1).max_new_tokens == 1
    assert one().max_new_tokens == DEFAULT_NEW_TOKENS
    assert one(max_new_tokens=509).max_new_tokens == 509
    assert one([0, 99]).prompt == (0, 99)
    for seed in (0, 2**64 - 1):
        assert one(seed=seed).seed == seed
    for params in (SamplingParams(0), SamplingParams(1e30), SamplingParams(1, 100, 1, 1), SamplingParams(1, 0, 1e-9)):
        assert one(params=params).params is params
    assert one(stop="ab").stops == ("ab",)


def test_equal_prompts_are_different_requests() -> None:
    first, second, other = make_requests([[1, 2], [1, 2], [2, 1]], LIMITS)
    assert len({first.key, second.key, other.key}) == 3
    assert first.key == one([1, 2]).key
