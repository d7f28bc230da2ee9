"""Verification: the reference, the ONNX functions, and the distribution of what is emitted."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest

from dspark_runtime.errors import InvalidTree
from dspark_runtime.speculation.sampling import SamplingParams, distribution, draw_token
from dspark_runtime.speculation.tree import TokenTree
from dspark_runtime.speculation.verify import verify_chain, verify_tree
from tests.plugins.host_library import sampling_inputs
from tests.references.laws import ChainLaw, token_law
from tests.shared.verification import Scripted, session

VOCAB = 24
ROWS = np.arange(64, dtype=np.float32)[:, None]  # stand-in logits: each row holds its own number
Array = np.ndarray[Any, Any]


def random_params(rng: np.random.Generator) -> SamplingParams:
    if rng.random() < 0.4:
        return SamplingParams()
    return SamplingParams(
        temperature=float(rng.choice([0.5, 1.0, 1.7])),
        top_k=int(rng.choice([0, 1, 5])),
        top_p=float(rng.choice([1.0, 0.9, 0.4])),
        min_p=float(rng.choice([0.0, 0.1])),
    )


def settled(logits: Array, params: SamplingParams, uniform: float) -> bool:
    """Whether the draw does not hang on the last bits of a cumulative sum, which may round differently."""
    low, high = max(uniform - 1e-5, 0.0), min(uniform + 1e-5, 0.99999)
    return params.greedy or draw_token(logits, params, low) == draw_token(logits, params, high)


def likely_tree(rng: np.random.Generator, logits: Array) -> TokenTree:
    """A random tree over the rows of ``logits`` whose tokens have a fair chance to be accepted."""
    rows = len(logits)
    while True:
        parents = [-1, *(int(rng.integers(max(0, row - 4), row)) for row in range(1, rows))]
        tokens = [0, *(int(np.argsort(-logits[parent])[rng.integers(0, 4)]) for parent in parents[1:])]
        try:
            return TokenTree(tokens, parents)
        except InvalidTree:  # two siblings drew the same token
            continue


@pytest.mark.parametrize("seed", range(8))
def test_tree_function_equals_reference(seed: int) -> None:
    rng = np.random.default_rng(seed)
    compared = 0
    for _ in range(150):
        batch, rows = int(rng.integers(1, 5)), int(rng.choice([1, 2, 5, 12]))
        counts = [rows, *(int(rng.integers(1, rows + 1)) for _ in range(batch - 1))]
        logits = rng.normal(0, 2, (batch, rows, VOCAB)).astype(np.float32)
        if rng.random() < 0.3:
            logits = np.round(logits)  # many ties
        trees = [likely_tree(rng, logits[i, :count]) for i, count in enumerate(counts)]
        tokens = np.zeros((batch, rows), np.int64)
        ancestors = np.repeat(np.eye(rows, dtype=bool)[None], batch, 0)  # padding rows see themselves
        for i, tree in enumerate(trees):
            tokens[i, : len(tree)] = tree.tokens
            ancestors[i, : len(tree), : len(tree)] = tree.ancestors()
        params = [random_params(rng) for _ in range(batch)]
        numbers = rng.random((batch, rows)).astype(np.float32)
        inputs = {
            "logits": logits,
            "tokens": tokens,
            "ancestors": ancestors,
            "uniforms": numbers,
            **sampling_inputs(params),
        }
        path, emitted, accepted = session("tree").run(None, inputs)
        for i, tree in enumerate(trees):
            if not all(settled(logits[i, r], params[i], float(numbers[i, r])) for r in range(len(tree))):
                continue
            drawn = [draw_token(logits[i, r], params[i], float(numbers[i, r])) for r in range(len(tree))]
            verdict = verify_tree(tree, ROWS, lambda row, _, drawn=drawn: drawn[int(row[0])], 0)
            filler = [-1] * (rows - len(verdict.path))
            assert path[i].tolist() == verdict.path + filler
            assert emitted[i].tolist() == verdict.tokens + filler
            assert accepted[i] == len(verdict.path) - 1
            compared += 1
    assert compared > 250


@pytest.mark.parametrize("seed", range(4))
def test_chain_function_equals_reference(seed: int) -> None:
    rng = np.random.default_rng(100 + seed)
    compared = 0
    for _ in range(150):
        batch, rows = int(rng.integers(1, 5)), int(rng.choice([2, 4, 7]))
        drafted = rng.integers(0, rows, batch)
        logits = rng.normal(0, 2, (batch, rows, VOCAB)).astype(np.float32)
        probs = rng.dirichlet(np.ones(VOCAB) * 0.3, (batch, rows - 1)).astype(np.float32)
        tokens = np.zeros((batch, rows), np.int64)
        order = np.argsort(-logits[:, :-1], axis=-1)
        picks = rng.integers(0, 4, (batch, rows - 1, 1))
        tokens[:, 1:] = np.take_along_axis(order, picks, -1)[..., 0]
        accept = rng.random((batch, rows - 1)).astype(np.float32)
        draw = rng.random((batch, rows)).astype(np.float32)
        params = [random_params(rng) for _ in range(batch)]
        inputs = {"logits": logits, "tokens": tokens, "draft_probs": probs, "drafted": drafted}
        inputs |= {"accept_uniforms": accept, "draw_uniforms": draw, **sampling_inputs(params)}
        path, emitted, accepted = session("chain").run(None, inputs)
        for i, count in enumerate(drafted.tolist()):
            verdicts = []
            for shift in (-1e-5, 0.0, 1e-5):
                uniform = np.clip(draw[i] + shift, 0, 0.99999)
                sampler: Any = Scripted(params[i], np.clip(accept[i] + shift, 0, 1), uniform)
                chain = tokens[i, 1 : count + 1].tolist()
                verdicts.append(verify_chain(chain, probs[i, :count], logits[i, : count + 1], sampler, 0))
            if verdicts[0] != verdicts[2]:
                continue
            filler = [-1] * (rows - len(verdicts[1].path))
            assert path[i].tolist() == verdicts[1].path + filler
            assert emitted[i].tolist() == verdicts[1].tokens + filler
            assert accepted[i] == len(verdicts[1].path) - 1
            compared += 1
    assert compared > 250


@pytest.mark.parametrize("params", [SamplingParams(1.0), SamplingParams(0.8, 5, 0.9, 0.02)], ids=["plain", "filtered"])
def test_tree_emits_the_target_distribution(params: SamplingParams) -> None:
    """The first token, and the second one after an accepted draft: every pair of draws, by its probability."""
    vocab = 8
    rng = np.random.default_rng(5)
    after = rng.normal(0, 1.5, (vocab + 1, vocab)).astype(np.float32)  # logits after each token; the last: the anchor's
    never, top = int(np.argmin(after[vocab])), int(np.argmax(after[vocab]))
    tree = TokenTree.from_paths(0, [[never, 3], [top, 2], [top, 4]])
    row_of = [vocab, *tree.tokens[1:]]
    targets = [distribution(row, params) for row in after]
    first, second = np.zeros(vocab), np.zeros((vocab, vocab))
    for drawn in product(range(vocab), repeat=2):  # what the anchor's row draws, and the row of an accepted draft
        tokens = verify_tree(tree, ROWS, lambda _, at, drawn=(*drawn, 0): drawn[at - 1], 0).tokens
        behind = targets[row_of[tree.child(0, drawn[0])]] if len(tokens) > 1 else np.full(vocab, 1 / vocab)
        probability = targets[vocab][drawn[0]] * behind[drawn[1]]
        first[tokens[0]] += probability
        if len(tokens) > 1:
            second[tokens[0], tokens[1]] += probability
    assert np.abs(first - targets[vocab]).max() < 1e-6
    assert {*np.flatnonzero(second.any(1)).tolist()} == {token for token in (never, top) if targets[vocab][token] > 0}
    for token in np.flatnonzero(second.any(1)):
        assert np.abs(second[token] / targets[vocab][token] - targets[token]).max() < 1e-6


@pytest.mark.parametrize(
    "params", [SamplingParams(1.0), SamplingParams(0.7, top_k=6), SamplingParams(1.3, top_p=0.7, min_p=0.05)]
)
def test_draws_follow_the_distribution(params: SamplingParams) -> None:
    """Over all uniform numbers there are."""
    logits = np.random.default_rng(1).normal(0, 2, 12).astype(np.float32)
    drawn = token_law(lambda uniform: draw_token(logits, params, uniform), 12)
    target = distribution(logits, params)
    assert np.abs(drawn - target).max() < 1e-6
    assert drawn[target == 0].sum() == 0


@pytest.mark.parametrize("case", ["equal", "close", "reversed", "misses mass", "zero target mass"])
def test_chain_emits_the_target_distribution(case: str) -> None:
    """Speculative sampling over all drafts and uniform numbers, and never a token the target gives no mass."""
    p = np.array([[0.4, 0.25, 0.15, 0.1, 0.1, 0.0], [0.1, 0.2, 0.3, 0.2, 0.2, 0.0]], np.float32)
    with np.errstate(divide="ignore"):
        logits = np.log(p)
    q = {
        "equal": distribution(logits[0], SamplingParams(1.0)),
        "close": np.array([0.38, 0.27, 0.15, 0.12, 0.08, 0]),
        "reversed": np.array([0, 0.1, 0.1, 0.15, 0.25, 0.4]),
        "misses mass": np.array([0, 0.5, 0.5, 0, 0, 0]),
        "zero target mass": np.array([0.1, 0.1, 0, 0, 0, 0.8]),
    }[case].astype(np.float32)
    chains = ChainLaw(logits, SamplingParams(1.0))
    first, second = np.zeros(6), np.zeros(6)
    for draft in np.flatnonzero(q):
        rejected, *accepted = chains.of([int(draft)], q[None])
        first += q[draft] * rejected
        for behind in accepted:
            first[draft] += q[draft] * behind.sum()
            second += q[draft] * behind
    assert np.abs(first - p[0]).max() < 1e-6
    assert first[5] == 0
    assert np.abs(second / second.sum() - p[1]).max() < 1e-6
    assert np.abs(second.sum() - np.minimum(p[0], q).sum()) < 1e-6  # the most that any rule can accept
