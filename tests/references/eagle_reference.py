"""EAGLE-3 drafting for one sequence, written out step by step: the reference of its graphs.

Nothing here shares code with the package. Every pass starts from the first row of the text; there is no cache.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from tests.references.block_reference import norm, turned

Tensor = torch.Tensor


@dataclass
class EagleShape:
    """What the arithmetic needs to know of a draft."""

    heads: int
    width: int
    epsilon: float = 1e-6
    theta: float = 10000.0
    gemma: bool = False
    softcap: float | None = None
    norm_before_residual: bool = False
    scale: float = 1.0


def linear(w: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    out = x @ w[f"{name}.weight"].T
    return out + w[f"{name}.bias"] if f"{name}.bias" in w else out


def hidden_rows(
    shape: EagleShape, w: Mapping[str, Tensor], embedding: Tensor, inputs: Tensor, tokens: Sequence[int]
) -> Tensor:
    """The drafter's output [rows, hidden], not normed, for hidden rows ``inputs`` and the tokens after them."""
    p, count = "layers.0.", len(tokens)
    positions = torch.arange(count)
    embedded = norm(embedding[list(tokens)] * shape.scale, w[f"{p}input_layernorm.weight"], shape.epsilon)
    normed = norm(inputs, w[f"{p}hidden_norm.weight"], shape.epsilon)
    rows = torch.cat([embedded, normed], -1)

    def heads(name: str) -> Tensor:
        return linear(w, f"{p}self_attn.{name}_proj", rows).reshape(count, -1, shape.width)

    query, key = heads("q"), heads("k")
    value = heads("v") if f"{p}self_attn.v_proj.weight" in w else key
    if f"{p}self_attn.q_norm.weight" in w:
        query = norm(query, w[f"{p}self_attn.q_norm.weight"], shape.epsilon)
        key = norm(key, w[f"{p}self_attn.k_norm.weight"], shape.epsilon)
    if shape.gemma:
        value = norm(value, None, shape.epsilon)
    query, key = turned(query, positions, shape.theta), turned(key, positions, shape.theta)
    attended = torch.zeros(count, shape.heads, shape.width)
    for row in range(count):
        for head in range(shape.heads):
            group = head * key.shape[1] // shape.heads
            scores = key[: row + 1, group] @ query[row, head] * (1.0 if shape.gemma else 1 / math.sqrt(shape.width))
            attended[row, head] = torch.softmax(scores, 0) @ value[: row + 1, group]
    out = linear(w, f"{p}self_attn.o_proj", attended.reshape(count, -1))
    if shape.gemma:
        out = norm(out, w[f"{p}post_attention_layernorm.weight"], shape.epsilon)
    x = (normed if shape.norm_before_residual else inputs) + out
    before = "pre_feedforward_layernorm" if shape.gemma else "post_attention_layernorm"
    inner = norm(x, w[f"{p}{before}.weight"], shape.epsilon)
    gate = linear(w, f"{p}mlp.gate_proj", inner)
    gate = torch.nn.functional.gelu(gate, approximate="tanh") if shape.gemma else gate * torch.sigmoid(gate)
    inner = linear(w, f"{p}mlp.down_proj", gate * linear(w, f"{p}mlp.up_proj", inner))
    if shape.gemma:
        inner = norm(inner, w[f"{p}post_feedforward_layernorm.weight"], shape.epsilon)
    x = x + inner
    return x * w[f"{p}layer_scalar"] if shape.gemma else x


def logits_of(shape: EagleShape, w: Mapping[str, Tensor], head: Tensor, hidden: Tensor) -> Tensor:
    out = norm(hidden, w["norm.weight"], shape.epsilon) @ head.T
    return out if shape.softcap is None else torch.tanh(out / shape.softcap) * shape.softcap


@dataclass
class EagleRound:
    """``hidden`` and ``logits`` of the text's rows and then of every step; ``tokens`` drafted, by target id."""

    hidden: Tensor
    logits: Tensor
    tokens: list[int]


def draft(
    shape: EagleShape,
    w: Mapping[str, Tensor],
    embedding: Tensor,
    head: Tensor,
    features: Tensor,
    text: Sequence[int],
    drafts: int,
    target_ids: Tensor | None = None,
) -> EagleRound:
    """One greedy round after ``text`` (its first token has no row), with features of all but the last token."""
    inputs, behind, tokens = linear(w, "fc", features), list(text[1:]), list[int]()
    while True:
        hidden = hidden_rows(shape, w, embedding, inputs, behind)
        logits = logits_of(shape, w, head, hidden)
        if len(tokens) == drafts:
            return EagleRound(hidden, logits, tokens)
        index = int(torch.argmax(logits[-1]))
        tokens.append(index if target_ids is None else int(target_ids[index]))
        inputs, behind = torch.cat([inputs, hidden[-1:]]), [*behind, tokens[-1]]
