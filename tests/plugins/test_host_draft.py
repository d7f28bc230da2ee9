"""The Markov loop and the moving of cache rows in the host build, against the drafters' modules and numpy."""

from __future__ import annotations

import numpy as np
import pytest

from dspark_runtime.speculation.sampling import inverse_cdf
from tests.plugins.draft_cases import draft_case, reference
from tests.plugins.host_library import DTYPES, KINDS, Array, HostLibrary


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_block_equals_the_drafters_module(host: HostLibrary, kind: str, dtype: str) -> None:
    rng = np.random.default_rng(5)
    sampled = greedy = 0
    for i in range(60):
        confident = ("none", "hidden", "token")[i % 3]
        case = draft_case(rng, kind, dtype, mapped=i % 2 == 1, confident=confident)
        tokens, probs, confidences = host.draft_block(kind, case)
        expected = reference(kind, case, tokens)
        assert np.abs(probs - expected.probs)[case["temperature"] > 0].max(initial=0) < 2e-5
        if expected.confidences is not None:
            assert np.abs(confidences - expected.confidences).max() < 2e-4
        ids = tokens if "token_map" not in case else np.argmax(tokens[..., None] == case["token_map"], -1)
        for b, row in enumerate(ids.tolist()):
            for slot, token in enumerate(row):
                if case["temperature"][b] == 0:
                    top = expected.logits[b, slot]
                    assert top[token] > top.max() - 1e-4
                    assert probs[b, slot].tolist() == np.eye(len(top))[token].tolist()
                    greedy += 1
                else:
                    uniform = float(case["uniforms"][b, slot])
                    near = {
                        inverse_cdf(expected.probs[b, slot], min(max(uniform + d, 0), 0.999999)) for d in (-1e-4, 1e-4)
                    }
                    assert min(near) <= token <= max(near) and probs[b, slot, token] > 0
                    sampled += 1
    assert sampled > 100 and greedy > 100


def test_a_full_vocabulary_and_rank(host: HostLibrary) -> None:
    rng = np.random.default_rng(0)
    vocab, rank = 262_144, 16
    case = {
        "base_logits": rng.normal(0, 2, (1, 2, vocab)).astype(np.float16),
        "hidden_rows": np.zeros((1, 2, 4), np.float16),
        "anchors": np.array([vocab - 1]),
        "temperature": np.array([0.8], np.float32),
        "uniforms": np.array([[0.3, 0.9]], np.float32),
        "w1": rng.normal(0, 1, (vocab, rank)).astype(np.float16),
        "w2": rng.normal(0, 0.2, (vocab, rank)).astype(np.float16),
    }
    tokens, probs, _ = host.draft_block("vanilla", case, threads=512)
    expected = reference("vanilla", case, tokens)
    assert np.abs(probs - expected.probs).max() < 1e-6 and np.abs(probs.sum(-1, dtype=np.float64) - 1).max() < 1e-4


def test_tokens_outside_and_damaged_logits(host: HostLibrary) -> None:
    rng = np.random.default_rng(1)
    for bad in (np.nan, np.inf):
        case = draft_case(rng, "vanilla", "float32", mapped=False, confident="token")
        case["temperature"][:] = 1
        case["anchors"][:] = 2**40  # clamped to a row that exists
        case["base_logits"][:, 0, 0] = bad
        tokens, probs, _ = host.draft_block("vanilla", case)
        assert (tokens[:, 0] == -1).all() and not probs[:, 0].any()


def moved(cache: Array, path: Array, accepted: Array, starts: Array) -> Array:
    result = cache.copy()
    for b, count in enumerate(accepted.tolist()):
        for j in range(1, count + 1):
            result[b, :, starts[b] + j] = cache[b, :, starts[b] + path[b, j]]
    return result


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int8])
def test_accepted_rows_are_moved(host: HostLibrary, dtype: type) -> None:
    rng = np.random.default_rng(2)
    some = 0
    for _ in range(150):
        batch, rows, capacity = int(rng.integers(1, 4)), int(rng.choice([1, 2, 6, 40, 128])), 140
        shapes = [(batch, int(rng.integers(1, 4)), capacity, int(rng.choice([1, 3, 16]))) for _ in range(3)]
        caches = [rng.integers(-99, 99, shape).astype(dtype) for shape in shapes]
        path, accepted = np.full((batch, rows), -1), np.zeros(batch, np.int64)
        for b in range(batch):
            accepted[b] = rng.integers(0, rows)
            others = np.sort(rng.choice(np.arange(1, rows), accepted[b], replace=False))
            path[b, : accepted[b] + 1] = [0, *others]
        starts = rng.integers(0, capacity - rows + 1, batch)
        expected = [moved(cache, path, accepted, starts) for cache in caches]
        some += sum(not np.array_equal(a, b) for a, b in zip(caches, expected, strict=True))
        host.compact_cache(caches, path, accepted, starts)
        assert all(np.array_equal(a, b) for a, b in zip(caches, expected, strict=True))
    assert some > 50


def test_a_path_that_cannot_be_moves_nothing_outside(host: HostLibrary) -> None:
    original = np.arange(2 * 8 * 4, dtype=np.float32).reshape(1, 2, 8, 4)
    for path, accepted, start in (
        ([0, 2, 9, 3], 3, 0),  # a row outside the pass
        ([0, 3, 2, 1], 3, 0),  # falling
        ([0, 2, 3, 3], 3, 6),  # beyond the capacity
        ([0, 1, 2, 3], 99, -1),
        ([0, -5, 2, 3], 3, 0),
    ):
        cache = original.copy()
        host.compact_cache([cache], np.array([path]), np.array([accepted]), np.array([start]))
        untouched = [slot for slot in range(8) if slot != start + 1]
        assert np.array_equal(cache[:, :, untouched], original[:, :, untouched])
