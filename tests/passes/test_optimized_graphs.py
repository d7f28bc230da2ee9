"""The rewritten graphs against the plain transformers model, and what each rewrite is expected to have done."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from transformers import PreTrainedModel

from dspark_export import passes
from dspark_export.bundle.weights import save_graphs
from tests import tiny_models
from tests.parity.harness import GraphRunner, Tree, assert_close, plain_logits, tree_logits
from tests.tiny_models import ARCHITECTURES, MAX_POSITIONS, VOCAB, WINDOW

LAYERS = tiny_models.LAYERS

Traced = Callable[[str], tuple[PreTrainedModel, ir.Model]]
every_architecture = pytest.mark.parametrize("arch", ARCHITECTURES)
WITHOUT_RMS_NORM = {"gpt2"}
WITHOUT_ROTARY = {"gpt2", "deepseek_v2", "deepseek_v3"}
"""gpt2 learns its positions; the others rotate interleaved pairs, which is left as traced."""
WITHOUT_GROUP_QUERY_ATTENTION = {"deepseek_v2", "deepseek_v3"}
"""Their keys and values have different widths, which the kernel does not take."""


def operators(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


@pytest.fixture(scope="session")
def rewritten(traced: Traced, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, object]]:
    made: dict[str, dict[str, object]] = {}

    def rewrite(arch: str) -> dict[str, object]:
        if arch not in made:
            model, graph = traced(arch)
            standard = passes.optimize(graph.clone())
            variant = passes.for_ort_cpu(standard, MAX_POSITIONS)
            paths = save_graphs({"standard": standard, "variant": variant}, tmp_path_factory.mktemp(arch))
            made[arch] = {"model": model, "before": graph, "standard": standard, "variant": variant, "paths": paths}
        return made[arch]

    return rewrite


def text(rng: np.random.Generator, length: int) -> list[int]:
    return [int(t) for t in rng.integers(3, VOCAB, length)]


@every_architecture
@pytest.mark.parametrize(("form", "batch"), [("standard", 2), ("variant", 1)])
def test_numbers_hold(arch: str, form: str, batch: int, rewritten: Callable[[str], dict]) -> None:
    made, rng = rewritten(arch), np.random.default_rng(5)
    path: Path = made["paths"][form]
    runner = GraphRunner(path, batch=batch)
    committed = [text(rng, 2 * WINDOW + 3), text(rng, 4)][:batch]
    prompts = [Tree.chain(tokens) for tokens in committed]
    for b, logits in enumerate(runner.step(prompts)):
        assert_close(logits, plain_logits(made["model"], committed[b]))
        runner.commit(b, prompts[b], len(committed[b]) - 1)
    for size in (1, 7, 12):
        trees = [Tree.random(rng, size, VOCAB) for _ in range(batch)]
        for b, logits in enumerate(runner.step(trees)):
            assert_close(logits, tree_logits(made["model"], committed[b], trees[b]))
            committed[b] += runner.commit(b, trees[b], int(rng.integers(size)))


@every_architecture
def test_the_standard_form_has_standard_operators_only(arch: str, rewritten: Callable[[str], dict]) -> None:
    standard: ir.Model = rewritten(arch)["standard"]
    assert {node.domain for node in standard.graph} <= {"", "ai.onnx"}
    assert set(standard.opset_imports) == {""}


@every_architecture
def test_norms_and_rotary_embeddings_are_folded(arch: str, rewritten: Callable[[str], dict]) -> None:
    made = rewritten(arch)
    before, after = operators(made["before"]), operators(made["standard"])
    norms = 0 if arch in WITHOUT_RMS_NORM else before["Sqrt"]
    assert after["RMSNormalization"] == norms
    if arch not in WITHOUT_RMS_NORM:
        assert norms >= 2 * LAYERS + 1 and after["Sqrt"] == after["Pow"] == 0
    if arch not in WITHOUT_ROTARY:
        assert after["RotaryEmbedding"] == before["Neg"] > 0 and after["Neg"] == 0


@every_architecture
def test_the_variant_reads_the_cache_in_place(arch: str, rewritten: Callable[[str], dict]) -> None:
    made = rewritten(arch)
    standard, variant = operators(made["standard"]), operators(made["variant"])
    if arch in WITHOUT_GROUP_QUERY_ATTENTION:
        assert variant["Attention"] == standard["Attention"] and variant["GroupQueryAttention"] == 0
        return
    assert variant["GroupQueryAttention"] == standard["Attention"] == LAYERS
    assert variant["TensorScatter"] == variant["Attention"] == variant["RotaryEmbedding"] == 0
    tables = [
        n for n in made["variant"].graph if n.op_type == "GroupQueryAttention" and n.attributes["do_rotary"].as_int()
    ]
    assert len(tables) == standard["RotaryEmbedding"] // 2


@pytest.mark.parametrize("arch", ["llama", "mistral", "qwen2", "olmo2"])
def test_projections_are_packed(arch: str, rewritten: Callable[[str], dict]) -> None:
    made = rewritten(arch)
    assert operators(made["before"])["MatMul"] - operators(made["standard"])["MatMul"] == 3 * LAYERS
    names = set(made["standard"].graph.initializers)
    assert {"model.layers.0.self_attn.qkv_proj.weight", "model.layers.0.mlp.gate_up_proj.weight"} <= names
    assert not any(f".{part}_proj.weight" in name for name in names for part in ("q", "gate", "up"))


@pytest.mark.parametrize("arch", ["llama", "qwen3", "mixtral"])
def test_residual_adds_join_the_norm_behind_them(arch: str, rewritten: Callable[[str], dict]) -> None:
    variant = operators(rewritten(arch)["variant"])
    assert variant["SkipSimplifiedLayerNormalization"] == 2 * LAYERS
