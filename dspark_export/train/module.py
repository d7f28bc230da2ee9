"""The drafter in training: many blocks of many sequences in one pass.

The arithmetic is that of :mod:`dspark_export.drafts.modules.block`, which the bundle's graph is traced from; parameters
have the names of a DeepSpec checkpoint. A block sees the features of all positions before its anchor's and all of
its own rows. Context rows are projected once per sequence and shared by its blocks.

It is separate from that module because that one is shaped by its graph: weights are constants read by name, one
block of a sequence runs over a cache, and the loop over slots is unrolled for tracing. Here parameters are trained and
all blocks of a sequence run in one pass. Tests hold both to one independent reference.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from dspark_export.drafts.formats.draft import DraftLayers, Rope
from dspark_export.drafts.modules.layers import inverse_frequencies

_INITIAL = 0.02
_FIRST_LOGITS = 1.5  # their standard deviation at first: a target's head makes unit rows sure of nonsense


@dataclass(frozen=True)
class DraftGeometry:
    """Sizes of a drafter for one target. ``taps``: target layers it reads; ``rope``: transformers' parameters of the
    target's rotary embedding, of which ``theta`` is the base; ``positions``: how far the target reaches."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    layers: int
    block: int
    taps: tuple[int, ...]
    mask_token: int
    markov: str
    rank: int
    confidence: bool
    theta: float
    rope: Mapping[str, object]
    positions: int
    epsilon: float

    def decoder_layers(self) -> DraftLayers:
        """The same as the form graphs are made from."""
        return DraftLayers(
            family="qwen3",
            count=self.layers,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            norm_epsilon=self.epsilon,
            activation="silu",
            attention_bias=False,
            rope=Rope(self.theta, 1.0, self.rope),
            windows=(None,) * self.layers,
            max_positions=self.positions,
            scale=self.head_dim**-0.5,
        )


class RmsNorm(nn.Module):
    """x / sqrt(mean(x^2) + epsilon) * weight over the last dimension, in float32."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self._epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self._epsilon)
        return (normed * self.weight).to(x.dtype)


class _Attention(nn.Module):
    def __init__(self, g: DraftGeometry) -> None:
        super().__init__()
        self.q_proj = nn.Linear(g.hidden, g.heads * g.head_dim, bias=False)
        self.k_proj = nn.Linear(g.hidden, g.kv_heads * g.head_dim, bias=False)
        self.v_proj = nn.Linear(g.hidden, g.kv_heads * g.head_dim, bias=False)
        self.o_proj = nn.Linear(g.heads * g.head_dim, g.hidden, bias=False)
        self.q_norm = RmsNorm(g.head_dim, g.epsilon)
        self.k_norm = RmsNorm(g.head_dim, g.epsilon)


class _FeedForward(nn.Module):
    def __init__(self, g: DraftGeometry) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(g.hidden, g.intermediate, bias=False)
        self.up_proj = nn.Linear(g.hidden, g.intermediate, bias=False)
        self.down_proj = nn.Linear(g.intermediate, g.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class _Layer(nn.Module):
    def __init__(self, g: DraftGeometry) -> None:
        super().__init__()
        self.input_layernorm = RmsNorm(g.hidden, g.epsilon)
        self.post_attention_layernorm = RmsNorm(g.hidden, g.epsilon)
        self.self_attn = _Attention(g)
        self.mlp = _FeedForward(g)
        self._g = g

    def forward(self, x: Tensor, context: Tensor, turns: _Turns, visible: Tensor) -> Tensor:
        """Rows ``x`` [batch, anchors, block, hidden] over ``context`` [batch, length, hidden]."""
        g, attention = self._g, self.self_attn
        rows = self.input_layernorm(x)

        def heads(projected: Tensor, norm: nn.Module | None, turn: tuple[Tensor, Tensor] | None) -> Tensor:
            split = projected.view(*projected.shape[:-1], -1, g.head_dim)
            if norm is not None:
                split = norm(split)
            return split if turn is None else turned(split, *turn)

        q = heads(attention.q_proj(rows), attention.q_norm, turns.block)
        own_k = heads(attention.k_proj(rows), attention.k_norm, turns.block)
        own_v = heads(attention.v_proj(rows), None, None)
        ctx_k = heads(attention.k_proj(context), attention.k_norm, turns.context)
        ctx_v = heads(attention.v_proj(context), None, None)
        # query heads in groups that share a key head: q [batch, anchors, block, kv_heads, group, head_dim]
        q = q.view(*q.shape[:-2], g.kv_heads, -1, g.head_dim) * g.head_dim**-0.5
        before = torch.einsum("bajkgd,bskd->bkgajs", q, ctx_k)
        before = before.masked_fill(~visible[:, None, None, :, None, :], float("-inf"))
        within = torch.einsum("bajkgd,baikd->bkgaji", q, own_k)
        weights = torch.softmax(torch.cat([before, within], -1).float(), -1).to(x.dtype)
        length = context.shape[1]
        mixed = torch.einsum("bkgajs,bskd->bajkgd", weights[..., :length], ctx_v)
        mixed = mixed + torch.einsum("bkgaji,baikd->bajkgd", weights[..., length:], own_v)
        x = x + attention.o_proj(mixed.flatten(-3))
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


@dataclass(frozen=True)
class _Turns:
    """Cosines and sines [..., 1, head_dim / 2] of context rows and of block rows."""

    context: tuple[Tensor, Tensor]
    block: tuple[Tensor, Tensor]


def turned(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotate the pairs (i, i + half) of the last dimension."""
    first, second = x.chunk(2, -1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], -1)


class _Markov(nn.Module):
    def __init__(self, g: DraftGeometry) -> None:
        super().__init__()
        self.markov_w1 = nn.Embedding(g.vocab, g.rank)
        self.markov_w2 = nn.Linear(g.rank, g.vocab, bias=False)
        if g.markov == "gated":
            self.gate_proj = nn.Linear(g.hidden + g.rank, g.rank)
        if g.markov == "rnn":
            self.joint_proj = nn.Linear(2 * g.rank + g.hidden, 3 * g.rank)
        self._kind = g.markov

    def rows(self, hidden: Tensor, previous: Tensor) -> tuple[Tensor, Tensor]:
        """What ``markov_w2`` multiplies, and the rows of ``markov_w1``, both [..., block, rank].

        ``hidden`` [..., block, hidden]; ``previous`` int64 [..., block]: the token before each slot.
        """
        embedded: Tensor = self.markov_w1(previous)
        if self._kind == "vanilla":
            return embedded, embedded
        if self._kind == "gated":
            return torch.sigmoid(self.gate_proj(torch.cat([hidden, embedded], -1))) * embedded, embedded
        state, out = torch.zeros_like(embedded[..., 0, :]), []
        for slot in range(hidden.shape[-2]):
            state, row = self.step(state, hidden[..., slot, :], embedded[..., slot, :])
            out.append(row)
        return torch.stack(out, -2), embedded

    def step(self, state: Tensor, hidden: Tensor, embedded: Tensor) -> tuple[Tensor, Tensor]:
        """One step of the recurrent head: the next state, and what ``markov_w2`` multiplies."""
        update, candidate, out = self.joint_proj(torch.cat([state, embedded, hidden], -1)).chunk(3, -1)
        keep = torch.sigmoid(update)
        return keep * state + (1 - keep) * torch.tanh(candidate), torch.tanh(out)

    def one(self, state: Tensor, hidden: Tensor, embedded: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`rows` for one slot of any kind of head."""
        if self._kind == "rnn":
            return self.step(state, hidden, embedded)
        if self._kind == "gated":
            return state, torch.sigmoid(self.gate_proj(torch.cat([hidden, embedded], -1))) * embedded
        return state, embedded


class _Confidence(nn.Module):
    def __init__(self, g: DraftGeometry) -> None:
        super().__init__()
        self.proj = nn.Linear(g.hidden + (g.rank if g.markov != "none" else 0), 1)


class TrainableDrafter(nn.Module):
    """A DSpark drafter over a frozen embedding and head.

    Args:
        geometry: its sizes.
        embedding: [vocab, hidden], as the target looks tokens up.
        head: [vocab, hidden] of the target.
        draft_ids: int64 [draft vocab], the tokens it may draft; None for all but the mask.
    """

    def __init__(
        self, geometry: DraftGeometry, embedding: Tensor, head: Tensor, draft_ids: Tensor | None = None
    ) -> None:
        super().__init__()
        g = self.geometry = geometry
        self.fc = nn.Linear(len(g.taps) * g.hidden, g.hidden, bias=False)
        self.hidden_norm = RmsNorm(g.hidden, g.epsilon)
        self.layers = nn.ModuleList([_Layer(g) for _ in range(g.layers)])
        self.norm = RmsNorm(g.hidden, g.epsilon)
        self.markov_head = _Markov(g) if g.markov != "none" else None
        self.confidence_head = _Confidence(g) if g.confidence else None
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=_INITIAL)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        ids = torch.arange(g.vocab) if draft_ids is None else draft_ids
        self.draft_ids: Tensor
        self.register_buffer("draft_ids", ids[ids != g.mask_token], persistent=False)
        places = torch.full((g.vocab,), -1, dtype=torch.int64)
        places[self.draft_ids] = torch.arange(len(self.draft_ids))
        self.places: Tensor
        self.register_buffer("places", places, persistent=False)
        self.embedding: Tensor
        self.register_buffer("embedding", embedding.detach(), persistent=False)
        self.head: Tensor
        self.register_buffer("head", head.detach()[self.draft_ids], persistent=False)
        with torch.no_grad():
            self.norm.weight.fill_(_FIRST_LOGITS / self._logit_scale())
        frequencies, self._turn_factor = inverse_frequencies(g.decoder_layers())
        self.frequencies: Tensor
        self.register_buffer("frequencies", frequencies, persistent=False)

    def _logit_scale(self) -> float:
        """Standard deviation of the logits of random rows of unit size."""
        return max(float(self.head.float().pow(2).sum(-1).mean().sqrt()), 1e-6)

    def forward(self, features: Tensor, ids: Tensor, anchors: Tensor) -> Tensor:
        """Rows after the last norm [batch, anchors, block, hidden].

        ``features`` [batch, length, taps * hidden] of every position; ``ids`` int64 [batch, length]; ``anchors`` int64
        [batch, anchors]: their positions, from 1.
        """
        g = self.geometry
        context = self.hidden_norm(self.fc(features))
        batch, length = ids.shape
        slots = torch.arange(g.block, device=ids.device)
        tokens = torch.full((*anchors.shape, g.block), g.mask_token, device=ids.device)
        tokens[..., 0] = ids.gather(1, anchors)
        x = self.embedding[tokens].to(features.dtype)
        here = torch.arange(length, device=ids.device)
        turns = _Turns(self._turn(here.expand(batch, length), x.dtype), self._turn(anchors[..., None] + slots, x.dtype))
        visible = here < anchors[..., None]
        for layer in self.layers:
            x = layer(x, context, turns, visible)
        out: Tensor = self.norm(x)
        return out

    def _turn(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        angles = positions[..., None, None].float() * self.frequencies
        return (angles.cos() * self._turn_factor).to(dtype), (angles.sin() * self._turn_factor).to(dtype)

    def logits(self, hidden: Tensor, correction: Tensor | None) -> Tensor:
        """Logits [..., draft vocab] of slots; ``correction`` [..., rank] is what the Markov head adds from."""
        out = hidden @ self.head.T.to(hidden.dtype)
        if correction is not None and self.markov_head is not None:
            out = out + correction @ self.markov_head.markov_w2.weight[self.draft_ids].T
        return out

    def confidence(self, hidden: Tensor, embedded: Tensor | None) -> Tensor:
        """Confidence logits [...] of slots."""
        assert self.confidence_head is not None
        rows = hidden if embedded is None else torch.cat([hidden, embedded], -1)
        out: Tensor = self.confidence_head.proj(rows)[..., 0]
        return out

    @torch.no_grad()
    def draft(self, hidden: Tensor, anchor_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Greedy drafts, int64 [..., block] of the target's ids, and confidence logits (0 without that head).

        ``hidden`` [..., block, hidden] of :meth:`forward`; ``anchor_ids`` int64 [...].
        """
        tokens, confidences, previous = [], [], anchor_ids
        rank = self.geometry.rank
        state = hidden.new_zeros((*anchor_ids.shape, rank))
        for slot in range(hidden.shape[-2]):
            row, correction, embedded = hidden[..., slot, :], None, None
            if self.markov_head is not None:
                embedded = self.markov_head.markov_w1(previous)
                state, correction = self.markov_head.one(state, row, embedded)
            if self.confidence_head is not None:
                confidences.append(self.confidence(row, embedded))
            previous = self.draft_ids[self.logits(row, correction).argmax(-1)]
            tokens.append(previous)
        drafted = torch.stack(tokens, -1)
        return drafted, torch.stack(confidences, -1) if confidences else torch.zeros_like(drafted, dtype=hidden.dtype)
