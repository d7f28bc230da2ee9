"""What a draft checkpoint says, whatever format it came in: one form that pair check and graphs work from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch.nn import functional

Family = Literal["qwen3", "gemma4"]
MarkovType = Literal["none", "vanilla", "gated", "rnn"]
TapsRule = Literal["given", "eagle3", "zlab"]

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


@dataclass(frozen=True)
class BlockConfig:
    """A DSpark or DFlash draft.

    ``taps``: target layers, ascending, outputs of 0-based layers, -1 for the embedding (shifted formats are already
    shifted back). ``block``: rows of a block. ``first_slot``: 0 if the anchor's row predicts the token behind it (then
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
    files do not name them, ``rope_copied`` says that the format copies the target's rotary settings.
    """

    id: str
    format: str
    directory: Path
    config: BlockConfig | EagleConfig
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
