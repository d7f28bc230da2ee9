"""The arithmetic of the plugins against the Python reference: filters, draws, ties, damaged rows."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dspark_runtime.errors import BackendError
from dspark_runtime.speculation.sampling import SamplingParams, distribution, draw_token
from tests.plugins.host_library import DTYPES, Array, HostLibrary, rounded

NEAR = 2e-6  # how close to a rounding boundary the reference's own float sums decide


def random_params(rng: np.random.Generator, vocab: int) -> SamplingParams:
    if rng.random() < 0.15:
        return SamplingParams()
    return rounded(
        SamplingParams(
            temperature=float(rng.choice([0.3, 0.7, 1.0, 1.8])),
            top_k=int(rng.choice([0, 0, 1, 5, max(1, vocab // 2), vocab])),
            top_p=float(rng.choice([1.0, 1.0, 0.95, 0.5, 0.01])),
            min_p=float(rng.choice([0.0, 0.0, 0.02, 0.5, 1.0])),
        )
    )


def random_logits(rng: np.random.Generator, vocab: int, dtype: str) -> Array:
    logits = rng.normal(0, float(rng.choice([0.1, 2.0, 8.0])), vocab)
    style = rng.random()
    if style < 0.4:
        logits = np.round(logits)  # many ties
    elif style < 0.5:
        logits[:] = logits[0]  # nothing but ties
    if rng.random() < 0.3:
        logits[rng.random(vocab) < 0.4] = -np.inf
    if not np.isfinite(logits).any():
        logits[rng.integers(vocab)] = 1.5
    if rng.random() < 0.1:
        logits = logits * 1e4
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(logits.astype(DTYPES[dtype][1]))


def shifted(params: SamplingParams, factor: float) -> SamplingParams:
    top_p = min(max(params.top_p * factor, 1e-9), 1.0) if params.top_p < 1 else 1.0
    return SamplingParams(params.temperature, params.top_k, top_p, min(params.min_p * factor, 1.0))


def kept(logits: Array, params: SamplingParams) -> Array:
    return np.flatnonzero(distribution(logits, params) > 1e-11)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(4))
def test_draws_equal_the_reference(host: HostLibrary, dtype: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    compared = of = 0
    for _ in range(400):
        vocab = int(rng.choice([1, 2, 7, 8, 9, 63, 300, 3000]))
        logits = random_logits(rng, vocab, dtype)
        wide = logits.astype(np.float32)
        if not np.isfinite(wide.max()):
            continue  # 1e4 times a normal number passes the largest float16
        params = random_params(rng, vocab)
        uniforms = [0.0, float(np.float32(1 - 2**-24)), *rng.random(3).astype(np.float32).tolist()]
        drawn = host.draw(np.repeat(logits[None], 5, 0), [params] * 5, uniforms)
        _, masses = host.masses(logits, params)
        of += 1
        exact = shifted(params, 1 + NEAR), shifted(params, 1 - NEAR)
        clear = np.array_equal(kept(wide, exact[0]), kept(wide, exact[1]))
        if clear and not (params.min_p == 1.0 or (masses < 1000).any()):
            assert np.array_equal(np.flatnonzero(masses), kept(wide, params)), params
        for token, uniform in zip(drawn.tolist(), uniforms, strict=True):
            assert masses[token] > 0
            low, high = max(uniform - NEAR, 0.0), min(uniform + NEAR, float(np.float32(1 - 2**-24)))
            if clear and draw_token(wide, params, low) == draw_token(wide, params, high):
                assert token == draw_token(wide, params, uniform), (params, uniform)
                compared += 1
    assert compared > 3.8 * of


def test_ties_at_a_cut_keep_the_lowest_ids(host: HostLibrary) -> None:
    logits = np.array([1.0, 2.0, 1.0, 2.0, 1.0], np.float32)
    for params, expected in [
        (SamplingParams(1.0, top_k=3), [0, 1, 3]),
        (SamplingParams(1.0, top_k=2), [1, 3]),
        (SamplingParams(1.0, top_p=0.25), [1]),
        (SamplingParams(1.0, top_k=4, top_p=0.8), [0, 1, 3]),
        (SamplingParams(1.0, min_p=1.0), [1, 3]),
    ]:
        assert np.flatnonzero(host.masses(logits, params)[1]).tolist() == expected == kept(logits, params).tolist()
    flat = np.zeros(5000, np.float32)
    assert np.flatnonzero(host.masses(flat, SamplingParams(1.0, top_p=0.5))[1]).tolist() == list(range(2500))
    assert np.flatnonzero(host.masses(flat, SamplingParams(1.0, 4000, 0.5))[1]).tolist() == list(range(2000))
    signed = np.array([[-1.0, -0.0, 0.0, -2.0]], np.float32)
    assert host.draw(signed, [SamplingParams()], [0.5]).tolist() == [1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_damaged_rows_are_those_the_reference_refuses(host: HostLibrary, dtype: str) -> None:
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(600):
        logits = rng.normal(0, 1, int(rng.choice([1, 4, 70]))).astype(DTYPES[dtype][1])
        for value in (np.nan, np.inf, -np.inf):
            if rng.random() < 0.4:
                logits[rng.random(len(logits)) < rng.choice([0.05, 0.5, 1.1])] = value
        params = SamplingParams() if rng.random() < 0.5 else SamplingParams(1.0, int(rng.choice([0, 2])))
        params = SamplingParams(params.temperature, min(params.top_k, len(logits)))
        token = int(host.draw(logits[None], [params], [0.4])[0])
        try:
            expected = draw_token(logits.astype(np.float32), params, 0.4)
        except BackendError:
            expected = -1
        assert token == expected, (logits, params)
        seen.add((expected == -1, params.greedy))
    assert len(seen) == 4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [32000, 151936, 262144])
def test_full_vocabularies(host: HostLibrary, dtype: str, vocab: int) -> None:
    rng = np.random.default_rng(vocab)
    logits = rng.normal(0, 2.5, (2, vocab)).astype(DTYPES[dtype][1])  # 16 bits leave many ties
    wide = logits.astype(np.float32)
    for params in (
        SamplingParams(),
        SamplingParams(1.0),
        rounded(SamplingParams(0.7, 50, 0.9, 0.01)),
        rounded(SamplingParams(1.2, 0, 0.97)),
    ):
        for uniform in (0.01, 0.5, 0.9997):
            drawn = host.draw(logits, [params] * 2, [uniform] * 2, threads=512)
            for row, token in enumerate(drawn.tolist()):
                near = {draw_token(wide[row], params, min(uniform + d, 0.99999)) for d in (-1e-5, 0.0, 1e-5)}
                assert token in near


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_number_of_threads_and_the_batch_change_nothing(host: HostLibrary, dtype: str) -> None:
    rng = np.random.default_rng(3)
    for vocab in (5, 1000, 40001):
        rows = 12
        logits = np.stack([random_logits(rng, vocab, dtype) for _ in range(rows)])
        params = [random_params(rng, vocab) for _ in range(rows)]
        uniforms = rng.random(rows).astype(np.float32).tolist()
        together = host.draw(logits, params, uniforms, threads=512)
        for threads in (64, 96, 1024):
            assert np.array_equal(together, host.draw(logits, params, uniforms, threads))
        for row in range(rows):
            alone = host.draw(logits[row : row + 1].copy(), params[row : row + 1], uniforms[row : row + 1])
            assert alone[0] == together[row]


def test_draws_follow_the_distribution(host: HostLibrary) -> None:
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 2, 12).astype(np.float32)
    draws = 50_000
    for params in (SamplingParams(1.0), SamplingParams(1.3, 8, 0.75, 0.05)):
        numbers = rng.random(draws).astype(np.float32)
        drawn = host.draw(np.repeat(logits[None], draws, 0), [params] * draws, numbers.tolist(), threads=32)
        assert np.abs(np.bincount(drawn, minlength=12) / draws - distribution(logits, params)).max() < 0.01


def test_16_bit_numbers_convert_exactly(host: HostLibrary) -> None:
    for dtype in ("float16", "bfloat16"):
        every = np.arange(65536, dtype=np.uint16).view(DTYPES[dtype][1])
        expected, found = every.astype(np.float32), host.to_float(every)
        nan = np.isnan(expected)
        assert np.array_equal(expected[~nan].view(np.uint32), found[~nan].view(np.uint32))
        assert np.isnan(found[nan]).all()


def test_exp_sigmoid_and_tanh_are_accurate(host: HostLibrary) -> None:
    rng = np.random.default_rng(0)
    x = -np.concatenate([rng.random(200_000) * 90, 10 ** rng.uniform(-12, 2, 200_000), [0.0, 87.3, 104.0, np.inf]])
    x = x.astype(np.float32)
    value = host.math(0, x)
    exact = np.exp(x.astype(np.float64))
    normal = x > -87.3
    assert (np.abs(value - exact)[normal] / np.spacing(exact[normal].astype(np.float32))).max() < 1.1
    assert (value[x < -87.34] == 0).all() and host.math(0, np.zeros(1, np.float32))[0] == 1
    ordered = np.sort(x[np.isfinite(x)])
    assert (np.diff(host.math(0, ordered)) >= 0).all()
    both = np.concatenate([x, -x])
    both = both[np.isfinite(both)]
    assert np.abs(host.math(1, both) - 1 / (1 + np.exp(-both.astype(np.float64)))).max() < 2e-7
    tanh = np.tanh(both.astype(np.float64))
    assert (np.abs(host.math(2, both) - tanh) <= 3e-7 * np.abs(tanh)).all()
    assert math.isnan(host.math(1, np.array([np.nan], np.float32))[0])
    assert math.isnan(host.math(2, np.array([np.nan], np.float32))[0])


@pytest.mark.parametrize(
    ("rows", "vocab", "threads", "error"), [(1, 262145, 64, 3), (1, 8, 31, 4), (1, 8, 100, 4), (1, 8, 2048, 4)]
)
def test_what_is_too_large_is_refused(host: HostLibrary, rows: int, vocab: int, threads: int, error: int) -> None:
    with pytest.raises(ValueError, match=f"error {error}"):
        host.draw(np.zeros((rows, vocab), np.float32), [SamplingParams()] * rows, [0.5] * rows, threads)
