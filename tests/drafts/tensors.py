"""Random weights of small drafts under DeepSpec's names, the normal form of every format."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Sizes:
    """Geometry of a draft; the defaults fit :func:`write_target`. ``taps`` are outputs of 0-based target layers."""

    hidden: int = 64
    vocab: int = 400
    inner: int = 96
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    layers: int = 2
    rank: int = 8
    block: int = 4
    taps: tuple[int, ...] = (1, 3, 5)
    target_layers: int = 8
    positions: int = 512
    theta: float = 10000.0

    @property
    def mask(self) -> int:
        """The mask token: the last row, which no text has."""
        return self.vocab - 1


def random_tables(sizes: Sizes, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """An embedding and a head, each [vocab, hidden]."""
    random = torch.Generator().manual_seed(seed + 1000)
    return tuple(torch.randn(sizes.vocab, sizes.hidden, generator=random) * 0.2 for _ in range(2))  # type: ignore[return-value]


def draft_ids(sizes: Sizes, count: int) -> torch.Tensor:
    """Target ids of a reduced vocabulary, ascending, spread over the tokens."""
    return torch.arange(count) * ((sizes.vocab - 16) // count)


def maps(ids: torch.Tensor, vocab: int) -> dict[str, torch.Tensor]:
    """d2t (offsets) and t2d (membership) of ``ids``."""
    members = torch.zeros(vocab, dtype=torch.bool)
    members[ids] = True
    return {"d2t": ids - torch.arange(len(ids)), "t2d": members}


class _Random:
    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self._generator) * 0.2


def block_tensors(
    sizes: Sizes,
    *,
    family: str = "qwen3",
    markov: str = "none",
    confidence: bool = False,
    with_markov: bool = True,
    bias: bool = False,
    k_eq_v: bool = False,
    draft_vocab: int | None = None,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """Weights of a DSpark or DFlash draft without embedding and head."""
    make, s = _Random(seed), sizes
    tensors = {
        "fc.weight": make(s.hidden, len(s.taps) * s.hidden),
        "hidden_norm.weight": 1 + make(s.hidden),
        "norm.weight": 1 + make(s.hidden),
    }
    for i in range(s.layers):
        tensors |= _layer(make, s, f"layers.{i}.", s.hidden, family, True, bias, k_eq_v)
    if markov != "none":
        tensors["markov_head.markov_w1.weight"] = make(s.vocab, s.rank)
        tensors["markov_head.markov_w2.weight"] = make(draft_vocab or s.vocab, s.rank)
    if markov == "gated":
        tensors["markov_head.gate_proj.weight"] = make(s.rank, s.hidden + s.rank)
        tensors["markov_head.gate_proj.bias"] = make(s.rank)
    if markov == "rnn":
        tensors["markov_head.joint_proj.weight"] = make(3 * s.rank, 2 * s.rank + s.hidden)
        tensors["markov_head.joint_proj.bias"] = make(3 * s.rank)
    if confidence:
        width = s.hidden + (s.rank if with_markov and markov != "none" else 0)
        tensors |= {"confidence_head.proj.weight": make(1, width), "confidence_head.proj.bias": make(1)}
    return tensors


def eagle_tensors(
    sizes: Sizes,
    *,
    family: str = "qwen3",
    qk_norm: bool = False,
    bias: bool = False,
    k_eq_v: bool = False,
    fc_bias: bool = False,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """Weights of an EAGLE-3 draft without embedding and head."""
    make, s = _Random(seed), sizes
    tensors = {"fc.weight": make(s.hidden, len(s.taps) * s.hidden), "norm.weight": 1 + make(s.hidden)}
    tensors |= {"fc.bias": make(s.hidden)} if fc_bias else {}
    tensors["layers.0.hidden_norm.weight"] = 1 + make(s.hidden)
    return tensors | _layer(make, s, "layers.0.", 2 * s.hidden, family, qk_norm, bias, k_eq_v)


def _layer(
    make: _Random, s: Sizes, p: str, width: int, family: str, qk_norm: bool, bias: bool, k_eq_v: bool
) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    norms = ["input_layernorm", "post_attention_layernorm"]
    if family == "gemma4":
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
        tensors[f"{p}layer_scalar"] = 1 + make(1)
    tensors |= {f"{p}{name}.weight": 1 + make(s.hidden) for name in norms}
    if qk_norm:
        tensors |= {f"{p}self_attn.{name}_norm.weight": 1 + make(s.head_dim) for name in "qk"}
    for name, heads in (("q", s.heads), ("k", s.kv_heads), ("v", s.kv_heads)):
        if name == "v" and k_eq_v:
            continue
        tensors[f"{p}self_attn.{name}_proj.weight"] = make(heads * s.head_dim, width)
        tensors |= {f"{p}self_attn.{name}_proj.bias": make(heads * s.head_dim)} if bias else {}
    tensors[f"{p}self_attn.o_proj.weight"] = make(s.hidden, s.heads * s.head_dim)
    tensors |= {f"{p}self_attn.o_proj.bias": make(s.hidden)} if bias else {}
    tensors |= {f"{p}mlp.{name}_proj.weight": make(s.inner, s.hidden) for name in ("gate", "up")}
    tensors[f"{p}mlp.down_proj.weight"] = make(s.hidden, s.inner)
    return tensors
