"""Graphs of EAGLE-3 drafters in ONNX Runtime against the step-by-step reference."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dspark_export.bundle.weights import save_graphs
from dspark_export.drafts.formats.draft import DraftCheckpoint, DraftLayers, EagleConfig, Rope
from dspark_export.drafts.graphs.eagle3 import export_eagle3
from dspark_export.passes import optimize, ort_cpu_variants
from dspark_runtime.backends.ort_graph import OrtGraphEngine, OrtGraphRunner
from dspark_runtime.bundle.contract import CacheLayer
from tests.drafts.writers import Sizes, draft_ids, eagle_tensors, random_tables
from tests.references.eagle_reference import EagleRound, EagleShape, draft, hidden_rows, linear, logits_of

CAPACITY, SIZES = 64, Sizes()


@dataclass
class Exported:
    """A random draft, its two graphs over one cache, and what the reference needs."""

    shape: EagleShape
    weights: dict[str, torch.Tensor]
    embedding: torch.Tensor
    head: torch.Tensor
    runners: tuple[OrtGraphRunner, OrtGraphRunner]
    target_ids: torch.Tensor | None

    def reference(self, features: torch.Tensor, text: list[int], drafts: int) -> EagleRound:
        return draft(self.shape, self.weights, self.embedding, self.head, features, text, drafts, self.target_ids)


def export(
    folder: Path,
    *,
    family: str = "qwen3",
    qk_norm: bool = False,
    fc_bias: bool = False,
    bias: bool = False,
    norm_before_residual: bool = False,
    draft_vocab: int | None = None,
    own_head: bool = False,
    dtype: str = "float32",
    variant: str = "onnxruntime-cpu",
    batch: int = 1,
) -> Exported:
    gemma = family == "gemma4"
    kind = getattr(torch, dtype)
    tensors = eagle_tensors(SIZES, family=family, qk_norm=qk_norm, fc_bias=fc_bias, bias=bias, k_eq_v=gemma, seed=3)
    layers = DraftLayers(
        "gemma4" if gemma else "qwen3",
        1,
        SIZES.hidden,
        SIZES.inner,
        SIZES.heads,
        SIZES.kv_heads,
        SIZES.head_dim,
        1e-6,
        "gelu_pytorch_tanh" if gemma else "silu",
        bias,
        Rope(SIZES.theta),
        (None,),
        SIZES.positions,
        k_eq_v=gemma,
        scale=1.0 if gemma else SIZES.head_dim**-0.5,
        softcap=30.0 if gemma else None,
    )
    vocab = draft_vocab or SIZES.vocab
    config = EagleConfig(layers, SIZES.taps, 7, SIZES.vocab, vocab, qk_norm, norm_before_residual, fc_bias)
    embedding, head = (table.to(kind) for table in random_tables(SIZES, 3))
    ids = None if draft_vocab is None else draft_ids(SIZES, draft_vocab) + 2
    if own_head:
        head = random_tables(SIZES, 8)[1][:vocab].to(kind)
        tensors["lm_head.weight"] = head
    scale = 8.0 if gemma else 1.0
    checkpoint = DraftCheckpoint("random", "classic", Path("."), config, tensors, ids, own_head=own_head)
    graphs = export_eagle3(
        checkpoint,
        embedding=embedding,
        head=head if own_head else random_tables(SIZES, 3)[1].to(kind),
        name="eagle",
        dtype=dtype,
        embedding_scale=scale,
    )
    for name, graph in graphs.items():
        optimize(graph)
        if variant != "standard":
            graphs[name] = ort_cpu_variants(graph, SIZES.positions)[variant]
    paths = save_graphs(graphs, folder)
    cache = [CacheLayer(SIZES.kv_heads, SIZES.head_dim, SIZES.head_dim)]
    extend, step = (OrtGraphEngine(paths[name], name=name, cache=cache) for name in ("eagle-extend", "eagle-step"))
    memory = extend.allocate(batch, CAPACITY)
    weights = {name: tensor.to(kind).float() for name, tensor in tensors.items()}
    shape = EagleShape(
        SIZES.heads,
        SIZES.head_dim,
        gemma=gemma,
        softcap=layers.softcap,
        norm_before_residual=norm_before_residual,
        scale=scale,
    )
    rows = head if ids is None or own_head else head[ids]
    return Exported(shape, weights, embedding.float(), rows.float(), (extend.open(memory), step.open(memory)), ids)


def run(
    runner: OrtGraphRunner,
    hidden: list[torch.Tensor],
    tokens: list[list[int]],
    starts: list[int],
    positions: list[list[int]] | None = None,
    sees: list[list[list[int]]] | None = None,
) -> dict[str, np.ndarray]:
    """A pass over a ragged batch, causal unless ``sees`` lists the slots of every row; logits of all rows."""
    batch, count = len(starts), max(map(len, tokens))
    kv_len = max(starts) + count
    name = "target_features" if hidden[0].shape[-1] != SIZES.hidden else "recurrent_hidden"
    inputs: dict[str, Any] = {
        "input_ids": np.zeros((batch, count), np.int64),
        name: np.zeros((batch, count, hidden[0].shape[-1]), np.float32),
        "position_ids": np.zeros((batch, count), np.int64),
        "attention_mask": np.zeros((batch, 1, count, kv_len), np.bool_),
        "write_indices": np.array(starts),
        "logit_rows": np.tile(np.arange(count), (batch, 1)),
    }
    for b, start in enumerate(starts):
        used = len(tokens[b])
        inputs["input_ids"][b, :used] = tokens[b]
        inputs[name][b, :used] = hidden[b].numpy()
        inputs["position_ids"][b] = np.arange(start, start + count) if positions is None else positions[b]
        for i in range(count):
            inputs["attention_mask"][b, 0, i, : start + i + 1] = sees is None
            if sees is not None:
                inputs["attention_mask"][b, 0, i, sees[b][i]] = True
    runner.select(0, batch)
    return {key: value for key, value in runner.run(inputs).items() if key in ("logits", "draft_hidden")}


def close(found: np.ndarray, wanted: torch.Tensor) -> None:
    np.testing.assert_allclose(found, wanted.numpy(), rtol=0, atol=1e-4)


def check_round(exported: Exported, features: torch.Tensor, text: list[int], start: int, drafts: int = 4) -> list[int]:
    """Extend by the rows from ``start`` on, then step; every value of both as the reference has it. The drafts."""
    expected = exported.reference(features, text, drafts)
    extend, step = exported.runners
    found = run(extend, [features[start:]], [text[start + 1 :]], [start])
    end = len(features)
    close(found["draft_hidden"][0], expected.hidden[start:end])
    close(found["logits"][0], expected.logits[start:end])
    tokens: list[int] = []
    for number in range(drafts):
        index = int(found["logits"][0, -1].argmax())
        tokens.append(index if exported.target_ids is None else int(exported.target_ids[index]))
        hidden = torch.from_numpy(found["draft_hidden"][0, -1:].copy())
        found = run(step, [hidden], [tokens[-1:]], [end + number])
        close(found["draft_hidden"][0], expected.hidden[end + number][None])
        close(found["logits"][0], expected.logits[end + number][None])
    assert tokens == expected.tokens
    return tokens


VARIANTS = {
    "DeepSpec": {"qk_norm": True},
    "DeepSpec with biases": {"qk_norm": True, "bias": True},
    "Gemma 4": {"family": "gemma4", "qk_norm": True},
    "classic, own head and vocabulary": {"fc_bias": True, "draft_vocab": 96, "own_head": True},
    "residual of the normed row": {"norm_before_residual": True},
    "target's head, reduced vocabulary": {"draft_vocab": 48},
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_extend_four_steps_and_the_next_rounds(options: dict[str, Any], tmp_path: Path) -> None:
    """Rows of the steps are overwritten by the rows of the text, with the target's features."""
    exported = export(tmp_path, **options)
    random = torch.Generator().manual_seed(7)
    features = torch.randn(20, len(SIZES.taps) * SIZES.hidden, generator=random)
    text = torch.randint(0, SIZES.vocab, (21,), generator=random).tolist()
    start = 0
    for end in (9, 12, 13):
        check_round(exported, features[:end], text[: end + 1], start)
        start = end


@pytest.mark.parametrize("variant", ["standard", "onnxruntime-cpu"])
def test_two_siblings_of_one_level(variant: str, tmp_path: Path) -> None:
    """Nodes of a tree share a position and do not see each other: each is as if it were the only one."""
    exported = export(tmp_path, qk_norm=True, variant=variant)
    random = torch.Generator().manual_seed(1)
    features = torch.randn(6, len(SIZES.taps) * SIZES.hidden, generator=random)
    text = torch.randint(0, SIZES.vocab, (7,), generator=random).tolist()
    extend, step = exported.runners
    first = run(extend, [features], [text[1:]], [0])
    hidden = torch.from_numpy(first["draft_hidden"][0, -1:].copy())
    context = list(range(6))
    found = run(step, [hidden.repeat(2, 1)], [[11, 12]], [6], positions=[[6, 6]], sees=[[[*context, 6], [*context, 7]]])
    inputs = torch.cat([linear(exported.weights, "fc", features), hidden])
    for row, token in enumerate((11, 12)):
        wanted = hidden_rows(exported.shape, exported.weights, exported.embedding, inputs, [*text[1:], token])
        close(found["draft_hidden"][0, row], wanted[-1])
        close(found["logits"][0, row], logits_of(exported.shape, exported.weights, exported.head, wanted[-1]))


def test_a_ragged_batch(tmp_path: Path) -> None:
    exported = export(tmp_path, qk_norm=True, variant="standard", batch=2)
    random = torch.Generator().manual_seed(4)
    features = [torch.randn(n, len(SIZES.taps) * SIZES.hidden, generator=random) for n in (11, 6)]
    texts = [torch.randint(0, SIZES.vocab, (n,), generator=random).tolist() for n in (12, 7)]
    starts, ends = [0, 0], [8, 3]
    for _ in range(2):
        parts = [rows[start:end] for rows, start, end in zip(features, starts, ends, strict=True)]
        tokens = [text[start + 1 : end + 1] for text, start, end in zip(texts, starts, ends, strict=True)]
        found = run(exported.runners[0], parts, tokens, starts)
        for b in range(2):
            wanted = exported.reference(features[b][: ends[b]], texts[b][: ends[b] + 1], 0)
            close(found["logits"][b, : len(parts[b])], wanted.logits[starts[b] :])
            close(found["draft_hidden"][b, : len(parts[b])], wanted.hidden[starts[b] :])
        starts, ends = ends, [11, 6]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_weights_in_float32_arithmetic(dtype: str, tmp_path: Path) -> None:
    """On the CPU a half-precision draft computes in float32 with its weights as they are."""
    exported = export(tmp_path, qk_norm=True, dtype=dtype)
    random = torch.Generator().manual_seed(7)
    features = torch.randn(9, len(SIZES.taps) * SIZES.hidden, generator=random)
    check_round(exported, features, torch.randint(0, SIZES.vocab, (10,), generator=random).tolist(), 0)
