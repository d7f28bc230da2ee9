"""Sampled drafts keep the target's distribution: drafts drawn by the graph, verified by rejection sampling."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dspark_runtime.speculation.sampling import Sampler, SamplingParams
from dspark_runtime.speculation.verify import verify_chain
from tests.parity.test_block_drafter import export, run
from tests.references.draft_samples import HIDDEN, TAPS, VOCAB

DRAWS, BATCH = 200_000, 2000


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_emitted_tokens_have_the_targets_distribution(temperature: float, tmp_path: Path) -> None:
    exported = export(tmp_path, "vanilla", "qwen3", block=2)
    random = np.random.default_rng(int(10 * temperature))
    features = torch.randn(6, TAPS * HIDDEN, generator=torch.Generator().manual_seed(3))
    logits = random.normal(size=(3, VOCAB)).astype(np.float32) * 2
    runner = exported.open(BATCH)
    counts = np.zeros((2, VOCAB))
    drafted = np.zeros(VOCAB)
    params = SamplingParams(temperature)
    for start in range(0, DRAWS, BATCH):
        samplers = [Sampler(params, start + i, 7) for i in range(BATCH)]
        uniforms = torch.from_numpy(np.stack([sampler.draft_uniforms(10, 2, False) for sampler in samplers]))
        found = run(exported, runner, [features] * BATCH, [0] * BATCH, [21] * BATCH, [temperature] * BATCH, uniforms)
        for i, sampler in enumerate(samplers):
            chain = found["draft_tokens"][i].tolist()
            drafted[chain[0]] += 1
            emitted = verify_chain(chain, found["draft_probs"][i], logits, sampler, 9).tokens
            for place, token in enumerate(emitted[:2]):
                counts[place, token] += 1
    for place in range(2):
        wide = np.exp((logits[place] - logits[place].max()).astype(np.float64) / temperature)
        seen = counts[place].sum()
        expected = wide / wide.sum()
        error = np.abs(counts[place] / seen - expected)
        assert (error < 5 * np.sqrt(expected * (1 - expected) / seen) + 1e-6).all()
    # the draft's own distribution is another one, so that agreement is not for free
    first = np.exp((logits[0] - logits[0].max()) / temperature)
    assert np.abs(drafted / DRAWS - first / first.sum()).sum() > 0.3
