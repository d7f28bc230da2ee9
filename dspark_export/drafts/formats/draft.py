"""A draft checkpoint in one form, whatever its format: what the pair check and the graphs work from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch.nn import functional

Family = Literal["qwen3", "gemma4"]
MarkovType = Literal["none", "vanilla", "gated", "rnn"]
TapsRule = Literal["given", "eagle3", "zlab"]
Shape = tuple[int, ...]

ACTIVATIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "swish": functional.silu,
    "gelu": functional.gelu,
    "gelu_pytorch_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
}
"""Activations by the names that configs give them."""


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of the draft: rotate-half pairs over the first ``partial`` share of the head.

    ``parameters`` are transformers' own (``rope_theta``, ``rope_type``, ...).
    """

    theta: float
    partial: float = 1.0
    parameters: Mapping[str, object] | None = None


@dataclass(frozen=True)
class DraftLayers:
    """Geometry of the draft's decoder layers, shared by all formats.

    ``windows``: sliding window of each layer in tokens, None for full attention. ``k_eq_v``: values are made by the
    key projection. ``scale`` of attention logits. ``softcap`` of the head's logits, None for none.
    """

    family: Family
    count: int
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_epsilon: float
    activation: str
    attention_bias: bool
    rope: Rope
    windows: tuple[int | None, ...]
    max_positions: int
    k_eq_v: bool = False
    scale: float = 1.0
    softcap: float | None = None

    def tensors(self, number: int, width: int, qk_norm: bool) -> Iterator[tuple[str, Shape]]:
        """Those of layer ``number``, whose projections read rows of ``width``."""
        p, hidden, inner, head = f"layers.{number}.", self.hidden_size, self.intermediate_size, self.head_dim
        norms = ["input_layernorm", "post_attention_layernorm"]
        if self.family == "gemma4":
            norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
            yield f"{p}layer_scalar", (1,)
        for name in norms:
            yield f"{p}{name}.weight", (hidden,)
        for name in ("q", "k") if qk_norm else ():
            yield f"{p}self_attn.{name}_norm.weight", (head,)
        projections = {"q": self.heads * head, "k": self.kv_heads * head}
        if not self.k_eq_v:
            projections["v"] = self.kv_heads * head
        shapes = {name: (rows, width) for name, rows in projections.items()} | {"o": (hidden, self.heads * head)}
        for name, shape in shapes.items():
            yield f"{p}self_attn.{name}_proj.weight", shape
            if self.attention_bias:
                yield f"{p}self_attn.{name}_proj.bias", shape[:1]
        yield f"{p}mlp.gate_proj.weight", (inner, hidden)
        yield f"{p}mlp.up_proj.weight", (inner, hidden)
        yield f"{p}mlp.down_proj.weight", (hidden, inner)


@dataclass(frozen=True)
class BlockConfig:
    """A DSpark or DFlash draft.

    ``taps``: target layers, ascending, outputs of 0-based layers, -1 for the embedding (shifted formats are already
    shifted back). ``block``: rows of a block. ``first_slot``: 0 if the anchor's row predicts the token after it (then
    ``drafts == block``), 1 if rows predict their own position (``drafts == block - 1``). ``causal_windows``: rows of a
    layer with a window see only block rows up to themselves.
    """

    layers: DraftLayers
    taps: tuple[int, ...]
    block: int
    first_slot: Literal[0, 1]
    mask_token_id: int
    vocab_size: int
    draft_vocab_size: int
    markov: MarkovType
    markov_rank: int
    confidence: bool
    confidence_with_markov: bool
    causal_windows: bool = False

    @property
    def drafts(self) -> int:
        """Tokens drafted per block."""
        return self.block - self.first_slot

    def tensors(self) -> Iterator[tuple[str, Shape]]:
        """What it needs beside the projection of the features and the last norm."""
        hidden, rank = self.layers.hidden_size, self.markov_rank
        yield "hidden_norm.weight", (hidden,)
        for i in range(self.layers.count):
            yield from self.layers.tensors(i, hidden, True)
        if self.markov != "none":
            yield "markov_head.markov_w1.weight", (self.vocab_size, rank)
            yield "markov_head.markov_w2.weight", (self.draft_vocab_size, rank)
        if self.markov == "gated":
            yield "markov_head.gate_proj.weight", (rank, hidden + rank)
            yield "markov_head.gate_proj.bias", (rank,)
        if self.markov == "rnn":
            yield "markov_head.joint_proj.weight", (3 * rank, 2 * rank + hidden)
            yield "markov_head.joint_proj.bias", (3 * rank,)
        if self.confidence:
            yield "confidence_head.proj.weight", (1, hidden + (rank if self.confidence_with_markov else 0))
            yield "confidence_head.proj.bias", (1,)


@dataclass(frozen=True)
class EagleConfig:
    """An EAGLE-3 draft of one decoder layer. ``steps``: drafts it was trained to make in a row.

    ``norm_before_residual``: the residual stream starts at the normed hidden row (a variant of public checkpoints).
    ``qk_norm``: queries and keys are normed per head. ``fc_bias``: the projection of the features has a bias.
    """

    layers: DraftLayers
    taps: tuple[int, ...]
    steps: int
    vocab_size: int
    draft_vocab_size: int
    qk_norm: bool
    norm_before_residual: bool = False
    fc_bias: bool = False

    @property
    def drafts(self) -> int:
        """Tokens drafted in a row."""
        return self.steps

    def tensors(self) -> Iterator[tuple[str, Shape]]:
        """What it needs beside the projection of the features and the last norm."""
        hidden = self.layers.hidden_size
        if self.fc_bias:
            yield "fc.bias", (hidden,)
        yield "layers.0.hidden_norm.weight", (hidden,)
        yield from self.layers.tensors(0, 2 * hidden, self.qk_norm)


DraftConfig = BlockConfig | EagleConfig


@dataclass(frozen=True)
class DraftCheckpoint:
    """An opened and checked draft.

    ``id`` is a hub id, or the name of a local folder; ``revision`` the commit of a hub draft, None for a local one.
    ``format``: the format's name for people. ``tensors``: all weights under DeepSpec's names (``fc.weight``,
    ``layers.0.self_attn.q_proj.weight``, ``markov_head.markov_w1.weight``, ...; an EAGLE-3 layer is ``layers.0``
    whatever the format calls it), lazily read, without the target's embedding and head unless ``own_embedding`` or
    ``own_head`` is set. ``target_ids``: int64 [draft_vocab], target id of every draft token; None for all of them.
    ``has_tokenizer``: tokenizer files lie beside the weights.

    For the pair check: ``copies`` are stored copies of the target's embedding and head, ``target_layers`` is the depth
    of the target it was trained for (None if unknown), ``taps_rule`` how ``taps`` follow from that depth where the
    files do not name them, ``rope_copied`` says that the format copies the target's rotary settings, ``odd_map``
    what is odd about the vocabulary map.
    """

    id: str
    format: str
    directory: Path
    config: DraftConfig
    tensors: Mapping[str, torch.Tensor]
    target_ids: torch.Tensor | None = None
    own_embedding: bool = False
    own_head: bool = False
    has_tokenizer: bool = False
    files: Mapping[str, str] | None = None
    copies: Mapping[str, torch.Tensor] = field(default_factory=dict)
    target_layers: int | None = None
    taps_rule: TapsRule = "given"
    rope_copied: bool = False
    revision: str | None = None
    odd_map: str = ""
