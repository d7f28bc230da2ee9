"""Random drafts of every kind, in the normal form that readers of checkpoints give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dspark_export.drafts.formats.draft import BlockConfig, DraftCheckpoint, DraftLayers, Rope
from tests.references.block_reference import Shape

HIDDEN, VOCAB, HEADS, KV_HEADS, WIDTH, INNER, RANK, TAPS = 48, 97, 4, 2, 16, 64, 8, 3


def random_block(
    markov: str = "vanilla",
    family: str = "qwen3",
    *,
    layers: int = 2,
    block: int = 4,
    first_slot: int = 0,
    confidence: bool = True,
    windows: tuple[int | None, ...] | None = None,
    causal: bool = False,
    hidden: int = HIDDEN,
    rank: int = RANK,
    vocab: int = VOCAB,
    taps: tuple[int, ...] = (0, 1, 2),
    seed: int = 0,
) -> tuple[DraftCheckpoint, Shape]:
    """A random block draft and what the reference has to know of it."""
    random = torch.Generator().manual_seed(seed)

    def make(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random) * 0.2

    gemma = family == "gemma4"
    geometry = DraftLayers(
        family,  # type: ignore[arg-type]
        layers,
        hidden,
        INNER,
        HEADS,
        KV_HEADS,
        WIDTH,
        1e-6,
        "gelu_pytorch_tanh" if gemma else "silu",
        False,
        Rope(10000.0, 0.25, {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 10000.0})
        if gemma
        else Rope(10000.0),
        windows or (None,) * layers,
        512,
        k_eq_v=gemma,
        scale=1.0 if gemma else WIDTH**-0.5,
        softcap=30.0 if gemma else None,
    )
    has_markov = markov != "none"
    config = BlockConfig(
        geometry,
        taps,
        block,
        first_slot,  # type: ignore[arg-type]
        vocab - 1,
        vocab,
        vocab,
        markov,  # type: ignore[arg-type]
        rank if has_markov else 0,
        confidence,
        confidence and has_markov,
        causal,
    )
    w: dict[str, Any] = {
        "fc.weight": make(hidden, len(taps) * hidden),
        "hidden_norm.weight": 1 + make(hidden),
        "norm.weight": 1 + make(hidden),
    }
    for i in range(layers):
        p = f"layers.{i}."
        norms = ["input_layernorm", "post_attention_layernorm"]
        if gemma:
            norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
            w[f"{p}layer_scalar"] = torch.tensor([0.9])
        else:
            w[f"{p}self_attn.v_proj.weight"] = make(KV_HEADS * WIDTH, hidden)
        w |= {f"{p}{name}.weight": 1 + make(hidden) for name in norms}
        w |= {f"{p}self_attn.{name}_norm.weight": 1 + make(WIDTH) for name in "qk"}
        w[f"{p}self_attn.q_proj.weight"] = make(HEADS * WIDTH, hidden)
        w[f"{p}self_attn.k_proj.weight"] = make(KV_HEADS * WIDTH, hidden)
        w[f"{p}self_attn.o_proj.weight"] = make(hidden, HEADS * WIDTH)
        w |= {f"{p}mlp.{name}_proj.weight": make(INNER, hidden) for name in ("gate", "up")}
        w[f"{p}mlp.down_proj.weight"] = make(hidden, INNER)
    if has_markov:
        w |= {f"markov_head.markov_w{n}.weight": make(vocab, rank) * 3 for n in (1, 2)}
    if markov == "gated":
        w["markov_head.gate_proj.weight"], w["markov_head.gate_proj.bias"] = make(rank, hidden + rank), make(rank)
    if markov == "rnn":
        w["markov_head.joint_proj.weight"] = make(3 * rank, 2 * rank + hidden)
        w["markov_head.joint_proj.bias"] = make(3 * rank)
    if confidence:
        w["confidence_head.proj.weight"] = make(1, hidden + (rank if has_markov else 0))
        w["confidence_head.proj.bias"] = make(1)
    shape = Shape(
        layers,
        HEADS,
        KV_HEADS,
        WIDTH,
        block,
        first_slot,
        vocab - 1,
        gemma=gemma,
        softcap=geometry.softcap,
        markov=markov,
        confidence_with_markov=config.confidence_with_markov,
        windows=windows or (),
        causal=causal,
        turned_pairs=2 if gemma else None,
    )
    return DraftCheckpoint("random", "DeepSpec", Path("."), config, w), shape
