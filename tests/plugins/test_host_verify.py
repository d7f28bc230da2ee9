"""Verification in the host build against the Python reference and the ONNX functions of the same names."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dspark_runtime.errors import BackendError, InvalidTree
from dspark_runtime.speculation.sampling import SamplingParams, distribution, draw_token, inverse_cdf
from dspark_runtime.speculation.tree import TokenTree
from dspark_runtime.speculation.verify import verify_chain, verify_tree
from tests.plugins.host_library import DTYPES, Array, HostLibrary, rounded, sampling_inputs
from tests.shared.verification import Scripted, session

VOCAB = 24
LAST = float(np.float32(1 - 2**-24))


def random_params(rng: np.random.Generator) -> SamplingParams:
    if rng.random() < 0.3:
        return SamplingParams()
    return rounded(
        SamplingParams(
            temperature=float(rng.choice([0.5, 1.0, 1.7])),
            top_k=int(rng.choice([0, 1, 5])),
            top_p=float(rng.choice([1.0, 0.9, 0.4])),
            min_p=float(rng.choice([0.0, 0.1])),
        )
    )


def random_tree(rng: np.random.Generator, logits: Array, agreeable: float) -> TokenTree:
    """A tree over the rows of ``logits``: chains, stars and mixed; tokens likely in the share ``agreeable``."""
    rows, vocab = logits.shape
    reach = int(rng.choice([1, 4, rows]))
    while True:
        parents = [-1, *(int(rng.integers(max(0, row - reach), row)) for row in range(1, rows))]
        tokens = [int(rng.integers(vocab))]
        for parent in parents[1:]:
            likely = np.argsort(-logits[parent].astype(np.float32), kind="stable")[: min(4, vocab)]
            wanted = int(likely[min(rng.geometric(0.6), len(likely)) - 1])
            tokens.append(wanted if rng.random() < agreeable else int(rng.integers(vocab)))
        try:
            return TokenTree(tokens, parents)
        except InvalidTree:  # siblings drew the same token
            reach = max(1, reach - 1)


def tree_inputs(
    rng: np.random.Generator, trees: list[TokenTree], logits: Array, params: list[SamplingParams]
) -> dict[str, Array]:
    batch, rows = logits.shape[:2]
    tokens = np.zeros((batch, rows), np.int64)
    ancestors = np.repeat(np.eye(rows, dtype=bool)[None], batch, 0)  # padding rows see themselves
    for i, tree in enumerate(trees):
        tokens[i, : len(tree)] = tree.tokens
        ancestors[i, : len(tree), : len(tree)] = tree.ancestors()
    numbers = rng.random((batch, rows)).astype(np.float32)
    return {"logits": logits, "tokens": tokens, "ancestors": ancestors, "uniforms": numbers, **sampling_inputs(params)}


def reference_tree(tree: TokenTree, logits: Array, params: SamplingParams, uniforms: Array) -> list[list[int]] | None:
    """Path and emitted tokens; None where the last digits of a sum decide."""
    outcomes = []
    for shift in (-1e-5, 0.0, 1e-5):
        numbers = np.clip(uniforms.astype(np.float64) + shift, 0, LAST)
        rows = np.arange(len(tree))
        # The reference draws from a row of logits; here a row holds its number, to find its uniform.
        verdict = verify_tree(
            tree,
            rows[:, None].astype(np.float32),
            lambda row, _, n=numbers: draw_token(logits[int(row[0])], params, float(n[int(row[0])])),  # type: ignore[misc]
            0,
        )
        outcomes.append([verdict.path, verdict.tokens])
    return outcomes[1] if outcomes[0] == outcomes[1] == outcomes[2] else None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(4))
def test_tree_equals_the_reference(host: HostLibrary, dtype: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    compared = of = full = rejected = 0
    for _ in range(150):
        batch, rows = int(rng.integers(1, 5)), int(rng.choice([1, 2, 5, 12, 40]))
        counts = [rows, *(int(rng.integers(1, rows + 1)) for _ in range(batch - 1))]
        logits = rng.normal(0, 2, (batch, rows, VOCAB))
        logits = (np.round(logits) if rng.random() < 0.4 else logits).astype(DTYPES[dtype][1])
        trees = [random_tree(rng, logits[i, :count], float(rng.choice([0.0, 0.9]))) for i, count in enumerate(counts)]
        params = [random_params(rng) for _ in range(batch)]
        inputs = tree_inputs(rng, trees, logits, params)
        path, emitted, accepted = host.verify_tree(inputs, threads=int(rng.choice([32, 64])))
        for i, tree in enumerate(trees):
            of += 1
            expected = reference_tree(tree, logits[i].astype(np.float32), params[i], inputs["uniforms"][i])
            if expected is None:
                continue
            filler = [-1] * (rows - len(expected[0]))
            assert path[i].tolist() == expected[0] + filler
            assert emitted[i].tolist() == expected[1] + filler
            assert accepted[i] == len(expected[0]) - 1
            compared += 1
            full += len(tree) > 1 and expected[0][-1] in tree.leaves()
            rejected += len(expected[0]) == 1 < len(tree)
    assert compared > 0.98 * of and full > 20 and rejected > 20


@pytest.mark.parametrize("kind", ["tree", "chain"])
def test_the_onnx_functions_give_the_same_outputs(host: HostLibrary, kind: str) -> None:
    rng = np.random.default_rng(8)
    equal = of = 0
    for _ in range(200):
        batch, rows = int(rng.integers(1, 5)), int(rng.choice([2, 3, 9]))
        logits = rng.normal(0, 2, (batch, rows, VOCAB)).astype(np.float32)
        params = [random_params(rng) for _ in range(batch)]
        if kind == "tree":
            inputs = tree_inputs(rng, [random_tree(rng, rows_of, 0.9) for rows_of in logits], logits, params)
            found = host.verify_tree(inputs)
        else:
            inputs = chain_inputs(rng, logits, params)
            found = host.verify_chain(inputs)
        expected = session(kind).run(None, inputs)
        for i in range(batch):
            of += 1
            equal += all(np.array_equal(a[i], b[i]) for a, b in zip(found, expected, strict=True))
    assert equal >= of - 2  # where float32 sums of the ONNX function round across a uniform


def chain_inputs(rng: np.random.Generator, logits: Array, params: list[SamplingParams]) -> dict[str, Array]:
    """Random draft distributions, some equal to the target's, and drafts drawn from them."""
    batch, rows, vocab = logits.shape
    probs = rng.dirichlet(np.ones(vocab) * 0.3, (batch, rows - 1)).astype(np.float32)
    for i in range(batch):
        for row in range(rows - 1):
            if rng.random() < 0.4:
                probs[i, row] = distribution(logits[i, row].astype(np.float32), params[i])
            elif rng.random() < 0.2:  # all mass on one token, perhaps one the target never gives
                probs[i, row] = np.eye(vocab, dtype=np.float32)[rng.integers(vocab)]
    tokens = np.zeros((batch, rows), np.int64)
    numbers = rng.random((batch, rows - 1)).astype(np.float32)
    for i in range(batch):
        for row in range(rows - 1):
            tokens[i, row + 1] = inverse_cdf(probs[i, row], float(numbers[i, row]))
    return {
        "logits": logits,
        "tokens": tokens,
        "draft_probs": probs,
        "drafted": rng.integers(0, rows, batch),
        "accept_uniforms": rng.random((batch, rows - 1)).astype(np.float32),
        "draw_uniforms": rng.random((batch, rows)).astype(np.float32),
        **sampling_inputs(params),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(4))
def test_chain_equals_the_reference(host: HostLibrary, dtype: str, seed: int) -> None:
    rng = np.random.default_rng(100 + seed)
    compared = of = full = rejected = 0
    for _ in range(150):
        batch, rows = int(rng.integers(1, 5)), int(rng.choice([1, 2, 4, 8]))
        logits = rng.normal(0, 2, (batch, rows, VOCAB))
        logits = (np.round(logits) if rng.random() < 0.3 else logits).astype(DTYPES[dtype][1])
        params = [random_params(rng) for _ in range(batch)]
        inputs = chain_inputs(rng, logits, params)
        path, emitted, accepted = host.verify_chain(inputs, threads=int(rng.choice([32, 64])))
        for i, count in enumerate(inputs["drafted"].tolist()):
            of += 1
            verdicts = []
            for shift in (-1e-5, 0.0, 1e-5):
                uniform = np.clip(inputs["draw_uniforms"][i] + shift, 0, LAST)
                accept = np.clip(inputs["accept_uniforms"][i] + shift, 0, 1)
                sampler: Any = Scripted(params[i], accept, uniform)
                chain = inputs["tokens"][i, 1 : count + 1].tolist()
                wide = logits[i, : count + 1].astype(np.float32)
                verdicts.append(verify_chain(chain, inputs["draft_probs"][i, :count], wide, sampler, 0))
            if not verdicts[0] == verdicts[1] == verdicts[2]:
                continue
            filler = [-1] * (rows - len(verdicts[1].path))
            assert path[i].tolist() == verdicts[1].path + filler
            assert emitted[i].tolist() == verdicts[1].tokens + filler
            assert accepted[i] == len(verdicts[1].path) - 1
            compared += 1
            full += len(verdicts[1].path) == count + 1 > 1
            rejected += len(verdicts[1].path) == 1 and count > 0
    assert compared > 0.95 * of and full > 20 and rejected > 20


def test_an_equal_draft_distribution_is_always_accepted(host: HostLibrary) -> None:
    rng = np.random.default_rng(4)
    params = [SamplingParams(1.0)] * 64
    logits = rng.normal(0, 2, (64, 6, 500)).astype(np.float32)
    inputs = chain_inputs(rng, logits, params)
    for i in range(64):
        for row in range(5):
            _, masses = host.masses(logits[i, row].copy(), params[i])
            inputs["draft_probs"][i, row] = masses.astype(np.float32) * np.float32(1 / float(masses.sum()))
            inputs["tokens"][i, row + 1] = inverse_cdf(inputs["draft_probs"][i, row], float(rng.random()))
    inputs["drafted"][:] = 5
    assert host.verify_chain(inputs)[2].tolist() == [5] * 64


def test_chain_emits_the_target_distribution(host: HostLibrary) -> None:
    """Speculative sampling over 40,000 rounds."""
    rounds, vocab = 40_000, 6
    rng = np.random.default_rng(0)
    row = np.log(np.array([0.4, 0.25, 0.15, 0.1, 0.1, 1e-30]))
    logits = np.ascontiguousarray(np.broadcast_to(row, (rounds, 2, vocab)).astype(np.float32))
    q = np.array([0.05, 0.1, 0.1, 0.15, 0.2, 0.4], np.float32)
    params = [SamplingParams(1.0)] * rounds
    inputs = {
        "logits": logits,
        "tokens": np.stack([np.zeros(rounds, np.int64), rng.choice(vocab, rounds, p=q / q.sum())], 1),
        "draft_probs": np.ascontiguousarray(np.broadcast_to(q, (rounds, 1, vocab))),
        "drafted": np.ones(rounds, np.int64),
        "accept_uniforms": rng.random((rounds, 1)).astype(np.float32),
        "draw_uniforms": rng.random((rounds, 2)).astype(np.float32),
        **sampling_inputs(params),
    }
    emitted = host.verify_chain(inputs, threads=32)[1]
    assert np.abs(np.bincount(emitted[:, 0], minlength=vocab) / rounds - np.exp(row)).max() < 0.012


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_damaged_row_ends_the_walk_and_shows(host: HostLibrary, value: float) -> None:
    rng = np.random.default_rng(2)
    params = [SamplingParams(1.0)] * 2
    logits = np.full((2, 4, VOCAB), -50, np.float32)
    logits[:, :, 3] = 50  # the draw after every row is certain
    tree = TokenTree([0, 3, 3, 3], [-1, 0, 1, 2])
    logits[0, 2, 7] = value
    inputs = tree_inputs(rng, [tree, tree], logits, params)
    path, emitted, accepted = host.verify_tree(inputs)
    assert path.tolist() == [[0, 1, 2, -1], [0, 1, 2, 3]]
    assert emitted.tolist() == [[3, 3, -1, -1], [3, 3, 3, 3]]
    assert accepted.tolist() == [2, 3]
    with pytest.raises(BackendError):
        draw_token(logits[0, 2], params[0], 0.5)
    probs = distribution(logits[1, 0], params[0])
    chain = {
        **inputs,
        "draft_probs": np.ascontiguousarray(np.broadcast_to(probs, (2, 3, VOCAB))),
        "drafted": np.array([3, 3]),
        "accept_uniforms": np.full((2, 3), 0.5, np.float32),
        "draw_uniforms": np.full((2, 4), 0.5, np.float32),
    }
    path, emitted, accepted = host.verify_chain(chain)
    assert emitted.tolist() == [[3, 3, -1, -1], [3, 3, 3, 3]] and accepted.tolist() == [2, 3]


def test_damaged_draft_probabilities_are_rejected(host: HostLibrary) -> None:
    rng = np.random.default_rng(3)
    logits = rng.normal(0, 1, (1, 3, VOCAB)).astype(np.float32)
    inputs = chain_inputs(rng, logits, [SamplingParams(1.0)])
    inputs["drafted"][:] = 2
    for probs, token in ((np.nan, 3), (np.inf, 3), (0.1, -1), (0.1, VOCAB), (0.1, 2**40)):
        inputs["draft_probs"][:] = probs
        inputs["tokens"][0, 1] = token
        _, emitted, accepted = host.verify_chain(inputs)
        assert accepted[0] == 0 and 0 <= emitted[0, 0] < VOCAB


def test_the_largest_tree(host: HostLibrary) -> None:
    """256 rows, accepted to the last: a chain of 128 drafts and 127 siblings that are wrong."""
    rows, vocab = 256, 300
    tokens = [0, *([5] * 128), *range(100, 227)]
    tree = TokenTree(tokens, [-1, *range(128), *([0] * 127)])
    logits = np.zeros((1, rows, vocab), np.float16)
    logits[:, :, 5] = 1
    inputs = tree_inputs(np.random.default_rng(0), [tree], logits, [SamplingParams()])
    path, emitted, accepted = host.verify_tree(inputs)
    assert accepted[0] == 128 and path[0, :129].tolist() == [*range(129)] and set(emitted[0, :129].tolist()) == {5}
