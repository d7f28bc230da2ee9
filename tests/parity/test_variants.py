"""Settings within the tested architectures that change the graph: rotary types, windows, biases, tying."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dspark_export.bundle.weights import save_graphs
from dspark_export.graphs.target import export_target
from tests import tiny_models
from tests.parity.harness import GraphRunner, Tree, assert_close, plain_logits, tree_logits
from tests.tiny_models import VOCAB, WINDOW

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
PLAIN = {"rope_type": "default", "rope_theta": 5000.0}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "yarn": ("qwen3", {"rope_parameters": YARN}),
    "yarn with attention scale": (
        "deepseek_v3",
        {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.8}},
    ),
    "complex yarn": ("deepseek_v2", {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.7}}),
    "linear scaling, no window": ("mistral", {"rope_parameters": LINEAR, "sliding_window": None}),
    "partial rotary": ("phi3", {"rope_parameters": {**PLAIN, "partial_rotary_factor": 0.5}}),
    "scaled rotary in global layers": (
        "gemma3_text",
        {"rope_parameters": {"full_attention": LINEAR, "sliding_attention": PLAIN}},
    ),
    "experts with a window": ("mixtral", {"sliding_window": WINDOW}),
    "greedy routing, no query compression": ("deepseek_v2", {"topk_method": "greedy", "q_lora_rank": None}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True, "rope_parameters": PLAIN}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "untied": ("gemma2", {"tie_word_embeddings": False}),
    "no window, no softcap": (
        "gemma2",
        {
            "layer_types": ["full_attention"] * 3,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
        },
    ),
    "one key/value head": ("qwen2", {"num_key_value_heads": 1, "use_sliding_window": False}),
    "a head for every query": ("olmo2", {"num_key_value_heads": 4}),
    "plain scaling": ("gpt2", {"scale_attn_by_inverse_layer_idx": False, "scale_attn_weights": False}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_prefill_and_tree_steps(name: str, tmp_path: Path) -> None:
    arch, overrides = VARIANTS[name]
    _, model = tiny_models.make(arch, **overrides)
    runner = GraphRunner(save_graphs({"target": export_target(model)}, tmp_path)["target"], batch=2)
    rng = np.random.default_rng(1)
    committed = [[int(t) for t in rng.integers(3, VOCAB, length)] for length in (3 * WINDOW, 4)]
    prompts = [Tree.chain(tokens) for tokens in committed]
    for b, logits in enumerate(runner.step(prompts)):
        assert_close(logits, plain_logits(model, committed[b]))
        runner.commit(b, prompts[b], len(committed[b]) - 1)
    for sizes in ((6, 3), (1, 8)):
        trees = [Tree.random(rng, size, VOCAB) for size in sizes]
        for b, logits in enumerate(runner.step(trees)):
            assert_close(logits, tree_logits(model, committed[b], trees[b]))
            committed[b] += runner.commit(b, trees[b], len(trees[b].tokens) - 1)
