"""One test for each further architecture: traced, optimized and as ONNX Runtime variant, against transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dspark_export import passes
from dspark_export.bundle.weights import save_graphs
from dspark_export.graphs.target import export_target
from tests import tiny_models
from tests.parity.harness import GraphRunner, Tree, assert_close, plain_logits, tree_logits
from tests.tiny_models import MAX_POSITIONS, MORE_ARCHITECTURES, VOCAB, WINDOW


@pytest.mark.parametrize("arch", MORE_ARCHITECTURES)
def test_prefill_and_tree_steps_in_every_form(arch: str, tmp_path: Path) -> None:
    _, model = tiny_models.make(arch, num_hidden_layers=2)
    traced = export_target(model)
    optimized = passes.optimize(traced.clone())
    variant = passes.for_ort_cpu(optimized, MAX_POSITIONS)
    graphs = {"traced": traced, "optimized": optimized, "variant": variant}
    paths = save_graphs(graphs, tmp_path)
    rng = np.random.default_rng(1)
    texts = [[int(t) for t in rng.integers(3, VOCAB, length)] for length in (3 * WINDOW, 4)]
    trees = [Tree.random(rng, size, VOCAB) for size in (6, 9)]
    pairs = list(zip(texts, trees, strict=True))
    wanted = [(plain_logits(model, text), tree_logits(model, text, tree)) for text, tree in pairs]
    for form, batch in (("traced", 2), ("optimized", 2), ("variant", 1)):
        runner = GraphRunner(paths[form], batch=batch)
        prompts = [Tree.chain(text) for text in texts[:batch]]
        for b, logits in enumerate(runner.step(prompts)):
            assert_close(logits, wanted[b][0])
            runner.commit(b, prompts[b], len(texts[b]) - 1)
        for b, logits in enumerate(runner.step(trees[:batch])):
            assert_close(logits, wanted[b][1])
