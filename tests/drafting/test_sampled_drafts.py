"""Sampled drafts keep the target's distribution: drafts drawn by the graph, verified by rejection sampling."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dspark_runtime.speculation.sampling import SamplingParams, distribution, inverse_cdf
from tests.parity.test_block_drafter import Exported, export, run
from tests.references.draft_samples import HIDDEN, TAPS, VOCAB
from tests.references.laws import ChainLaw

ROWS = 1000
EDGE = 1e-5
"""Uniforms this close to where the next token begins may draw it or not: sums round differently."""


def drafted(exported: Exported, temperature: float, uniforms: np.ndarray) -> dict[str, np.ndarray]:
    """What the graph drafts for one context and each row of ``uniforms`` [rows, 2]."""
    rows = len(uniforms)
    features = torch.randn(6, TAPS * HIDDEN, generator=torch.Generator().manual_seed(3))
    numbers = torch.from_numpy(uniforms.astype(np.float32))
    runner = exported.open(rows)
    return run(exported, runner, [features] * rows, [0] * rows, [21] * rows, [temperature] * rows, numbers)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_emitted_tokens_have_the_targets_distribution(temperature: float, tmp_path: Path) -> None:
    """The graph draws by the probabilities it reports, and verification turns these into the target's: no samples."""
    exported = export(tmp_path, "vanilla", "qwen3", block=2)
    random = np.random.default_rng(int(10 * temperature))
    logits = random.normal(size=(3, VOCAB)).astype(np.float32) * 2
    params = SamplingParams(temperature)
    target = [distribution(row, params) for row in logits]
    even = (np.arange(ROWS) + 0.5) / ROWS
    numbers = np.stack([even, random.permutation(even)], 1)
    found = drafted(exported, temperature, numbers)
    first = found["draft_probs"][0, 0]
    assert np.ptp(found["draft_probs"][:, 0], axis=0).max() == 0  # the first draft's does not depend on any uniform
    settled = 0
    for tokens, probs, uniforms in zip(found["draft_tokens"], found["draft_probs"], numbers, strict=True):
        for token, weights, uniform in zip(tokens, probs, uniforms, strict=True):
            edges = [inverse_cdf(weights, uniform + shift) for shift in (-EDGE, EDGE)]
            settled += edges[0] == edges[1]
            assert token in edges
    assert settled > 1.9 * ROWS
    assert np.abs(first - target[0]).sum() > 0.3  # so that agreement is not for free

    chains = ChainLaw(logits, params)
    emitted, behind = np.zeros(VOCAB), np.zeros(VOCAB)
    for token in np.flatnonzero(first):
        rejected, accepted = chains.of([int(token)], first[None])
        emitted += first[token] * rejected
        emitted[token] += first[token] * accepted.sum()
    assert np.abs(emitted - target[0]).max() < 1e-6
    row = np.argmax(target[0][found["draft_tokens"][:, 0]] / first[found["draft_tokens"][:, 0]])  # surely accepted
    chain, probs = found["draft_tokens"][row], found["draft_probs"][row]
    for token in np.flatnonzero(probs[1]):
        _, rejected, accepted = chains.of([int(chain[0]), int(token)], probs)
        behind += probs[1, token] * rejected
        behind[token] += probs[1, token] * accepted.sum()
    assert abs(behind.sum() - 1) < 1e-6 and np.abs(behind - target[1]).max() < 1e-6
