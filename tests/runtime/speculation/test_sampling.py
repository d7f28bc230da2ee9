"""Filters, draws and random numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from dspark_runtime.errors import BackendError
from dspark_runtime.speculation.sampling import (
    ACCEPT,
    DRAW,
    Sampler,
    SamplingParams,
    UniformStream,
    distribution,
    draw_token,
    greedy_token,
    inverse_cdf,
    request_key,
    uniforms,
)


def test_filters_equal_transformers() -> None:
    rng = np.random.default_rng(0)
    for trial in range(200):
        logits = rng.normal(0, 3, int(rng.choice([7, 100, 2000]))).astype(np.float32)
        params = SamplingParams(
            float(rng.choice([0.3, 1.0, 1.8])),
            int(rng.choice([0, 1, 5])),
            float(rng.choice([0.2, 0.8, 0.97, 1.0])),
            float(rng.choice([0.0, 0.05, 0.5])),
        )
        steps = LogitsProcessorList([TemperatureLogitsWarper(params.temperature)])
        if params.top_k:
            steps.append(TopKLogitsWarper(params.top_k))
        if params.top_p < 1:
            steps.append(TopPLogitsWarper(params.top_p))
        if params.min_p:
            steps.append(MinPLogitsWarper(params.min_p))
        expected = torch.softmax(steps(None, torch.tensor(logits)[None]), -1)[0].numpy()
        assert np.abs(distribution(logits, params) - expected).max() < 1e-5, (trial, params)


def test_ties_at_a_cut_keep_the_lowest_ids() -> None:
    logits = np.array([1.0, 2.0, 1.0, 2.0, 1.0], np.float32)
    assert np.flatnonzero(distribution(logits, SamplingParams(1.0, top_k=3))).tolist() == [0, 1, 3]
    assert np.flatnonzero(distribution(logits, SamplingParams(1.0, top_p=0.3))).tolist() == [1]
    assert greedy_token(logits) == 1
    flat = np.zeros(5000, np.float32)
    assert np.flatnonzero(distribution(flat, SamplingParams(1.0, top_p=0.5))).tolist() == list(range(2500))


@pytest.mark.parametrize("size", [1, 3, 255, 256, 257, 2000, 49152])
def test_inverse_cdf_meets_the_definition(size: int) -> None:
    rng = np.random.default_rng(size)
    weights = rng.random(size).astype(np.float32) * (rng.random(size) < 0.5)
    weights[rng.integers(size)] = 0.7
    cumulative = np.cumsum(weights, dtype=np.float64)
    for uniform in [0.0, 0.999999940395, *rng.random(50)]:
        index = inverse_cdf(weights, float(uniform))
        assert weights[index] > 0
        goal = uniform * cumulative[-1]
        assert cumulative[index] > goal - 1e-6 * cumulative[-1]
        assert index == 0 or cumulative[index - 1] <= goal + 1e-6 * cumulative[-1]


def test_extreme_temperatures() -> None:
    logits = np.array([0.0, 5.0, 4.9, -1e30], np.float32)
    assert draw_token(logits, SamplingParams(1e-6), 0.999) == 1
    assert draw_token(logits, SamplingParams(1e-4), 0.999) == 1
    assert np.abs(distribution(logits, SamplingParams(1e9))[:3] - 1 / 3).max() < 1e-6


def test_damaged_logits_are_reported() -> None:
    logits = np.array([0.0, np.nan, 1.0], np.float32)
    for params in (SamplingParams(), SamplingParams(1.0)):
        with pytest.raises(BackendError, match="logits that are not"):
            draw_token(logits, params, 0.5)


def test_uniforms_are_uniform_independent_and_repeatable() -> None:
    numbers = uniforms(0, 0, DRAW, np.arange(200_000))
    assert numbers.dtype == np.float32
    assert numbers.min() >= 0 and numbers.max() < 1
    histogram = np.histogram(numbers, 50, (0, 1))[0]
    assert ((histogram - 4000) ** 2 / 4000).sum() < 90  # chi-square with 49 degrees of freedom, p about 0.0003
    for other in (uniforms(1, 0, DRAW, np.arange(200_000)), uniforms(0, 1, DRAW, np.arange(200_000))):
        assert abs(np.corrcoef(numbers, other)[0, 1]) < 0.01
    assert abs(np.corrcoef(numbers, uniforms(0, 0, ACCEPT, np.arange(200_000)))[0, 1]) < 0.01
    assert abs(np.corrcoef(numbers[1:], numbers[:-1])[0, 1]) < 0.01
    stream = UniformStream(5, 6, DRAW)
    order = [700, 3, 0, 255, 256, 3]
    assert [stream.at(p) for p in order] == uniforms(5, 6, DRAW, order).tolist()
    assert len({float(uniforms(s, 0, DRAW, [7])[0]) for s in (0, 1, 2**32, 2**63, 2**64 - 1)}) == 5


def test_drafting_accepting_and_drawing_are_independent() -> None:
    """Rejection sampling needs it, of a position and of its neighbour; drafts that are coupled share the draws."""
    positions, bins = 50_000, 6
    sampler = Sampler(SamplingParams(1.0), 4, 9)
    drafts = sampler.draft_uniforms(0, positions, False)
    accepts = np.array([sampler.accept_at(position) for position in range(positions)])
    draws = np.array([sampler.uniform_at(position) for position in range(positions)])
    for later in (0, 1):
        joint = np.stack([drafts[: positions - later], accepts[: positions - later], draws[later:]], 1)
        expected = len(joint) / bins**3
        counts = np.histogramdd(joint, bins, [(0, 1)] * 3)[0]
        assert ((counts - expected) ** 2 / expected).sum() < 295  # chi-square, 215 degrees of freedom, p about 0.0003
    assert sampler.draft_uniforms(0, positions, True).tolist() == draws.tolist()


def test_random_numbers_stay_what_they_are() -> None:
    """Seeds are a promise: the same seed gives the same text with the next release too."""
    assert uniforms(42, request_key([1, 2, 3]), DRAW, [0, 1, 1000]).tolist() == PINNED


PINNED = [0.11579543352127075, 0.3282621502876282, 0.7069222331047058]
