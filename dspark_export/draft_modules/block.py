"""A DSpark or DFlash drafter over the contract of :func:`dspark_runtime.draft_contract.block_contract`.

Context rows become keys and values and nothing else. Block rows run through the layers and see the context and all
rows of their block. Head logits get the Markov head's correction slot by slot: it depends on the token drafted before.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn import functional

from dspark_export.checkpoints.drafts.draft import BlockConfig
from dspark_export.draft_modules.layers import (
    Linear,
    activation,
    heads_of,
    inverse_frequencies,
    rms_norm,
    rotate,
    rotation,
)
from dspark_export.tracing import operators  # noqa: F401  (defines torch.ops.dspark)


class BlockModule(torch.nn.Module):
    """See the module's text.

    Args:
        config: the draft.
        weights: its tensors under DeepSpec's names.
        embedding: the target's, [vocab, hidden], shared.
        head: [draft vocab, hidden]: the target's, shared, or chosen rows of it.
        target_ids: int64 [draft vocab], None where draft ids are the target's.
        candidates: likeliest tokens returned per slot.
        markov_topk: correct only so many candidates per slot, others cannot be drafted; None for all.
        embedding_scale: what embeddings are multiplied with.
    """

    frequencies: torch.Tensor
    mask_id: torch.Tensor
    forbidden: torch.Tensor
    target_ids: torch.Tensor | None
    hidden_norm: torch.nn.Parameter
    norm: torch.nn.Parameter

    def __init__(
        self,
        config: BlockConfig,
        weights: Mapping[str, torch.Tensor],
        *,
        embedding: torch.Tensor,
        head: torch.Tensor,
        target_ids: torch.Tensor | None,
        candidates: int,
        markov_topk: int | None,
        embedding_scale: float,
    ) -> None:
        super().__init__()
        self.config, self._candidates, self._scale = config, candidates, embedding_scale
        self._topk = None if markov_topk is None else min(markov_topk, len(head))
        self.embedding = torch.nn.Parameter(embedding, requires_grad=False)
        self.head = torch.nn.Parameter(head, requires_grad=False)
        self._layers = [_Layer(self, config, weights, i) for i in range(config.layers.count)]
        self._fc = Linear(self, weights, "fc")
        for name in ("hidden_norm", "norm"):
            self.register_parameter(name, torch.nn.Parameter(weights[f"{name}.weight"], requires_grad=False))
        self._markov = _Markov(self, config, weights, target_ids) if config.markov != "none" else None
        self._confidence = Linear(self, weights, "confidence_head.proj") if config.confidence else None
        frequencies, self._factor = inverse_frequencies(config.layers)
        self.register_buffer("frequencies", frequencies)
        mask_id = torch.full((1,), config.mask_token_id)
        self.register_buffer("mask_id", mask_id)
        ids = torch.arange(len(head)) if target_ids is None else target_ids
        self.register_buffer("forbidden", torch.where(ids == mask_id, float("-inf"), 0.0).to(torch.float32))
        self.register_buffer("target_ids", None if target_ids is None else target_ids)

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The contract's outputs, then the inner values of :func:`inner_outputs`."""
        features, feature_positions, anchors, block_positions, mask, write_indices, temperature, uniforms, *past = (
            inputs
        )
        config = self.config
        epsilon = config.layers.norm_epsilon
        context = rms_norm(self._fc(features), self.hidden_norm, epsilon)
        filler = self.mask_id.expand(anchors.shape[0], config.block - 1)
        x = functional.embedding(torch.cat((anchors[:, None], filler), 1), self.embedding)
        if self._scale != 1.0:
            x = x * self._scale
        turn = rotation(torch.cat((feature_positions, block_positions), 1), self.frequencies, self._factor)
        present: list[torch.Tensor] = []
        injected: list[torch.Tensor] = []
        for i, layer in enumerate(self._layers):
            x, key, value, own_key, own_value = layer(
                x, context, turn, mask, block_positions, write_indices, past[2 * i], past[2 * i + 1]
            )
            present += [key, value]
            injected += [own_key, own_value]
        hidden = rms_norm(x, self.norm, epsilon)[:, config.first_slot :]
        base = functional.linear(hidden, self.head).float()
        if config.layers.softcap is not None:
            base = torch.tanh(base / config.layers.softcap) * config.layers.softcap
        drafted = self._draft(hidden, base, anchors, temperature, uniforms)
        return (*drafted[:-1], *present, context, hidden, base, drafted[-1], *injected)

    def _draft(
        self,
        hidden: torch.Tensor,
        base: torch.Tensor,
        anchors: torch.Tensor,
        temperature: torch.Tensor,
        uniforms: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """Tokens, distributions, candidates and their probabilities, confidences if any, corrected logits."""
        drawn = torch.nonzero(temperature > 0)[:, 0]  # sequences that draw their tokens: none in a greedy call
        heat, chance = temperature[drawn][:, None], uniforms[drawn]
        few = None if self._topk is None else torch.topk(base + self.forbidden, self._topk)[1]
        state = None if self._markov is None else self._markov.start(hidden[:, 0])
        previous = anchors
        tokens: list[torch.Tensor] = []
        logits: list[torch.Tensor] = []
        found: list[torch.Tensor] = []
        probs: list[torch.Tensor] = []
        markov: list[torch.Tensor] = []
        for slot in range(self.config.drafts):
            corrected = base[:, slot]
            if self._markov is not None:
                row = self._markov.embed(previous)
                bias, state = self._markov(row, hidden[:, slot], state)
                corrected = corrected + bias
                markov.append(row)
            allowed = corrected + self.forbidden
            if few is not None:
                kept = torch.full_like(allowed, float("-inf"))
                allowed = kept.scatter(1, few[:, slot], allowed.gather(1, few[:, slot]))
            best = torch.topk(allowed, self._candidates)[1]
            spread = torch.softmax(allowed[drawn] / heat, -1)
            index = best[:, 0].scatter(0, drawn, inverse_cdf(spread, chance[:, slot]))
            previous = index if self.target_ids is None else self.target_ids[index]
            for whole, part in zip(
                (tokens, logits, found, probs),
                (previous, corrected if few is None else allowed, best, spread),
                strict=True,
            ):
                whole.append(part)
        corrected = torch.stack(logits, 1)
        candidates = torch.stack(found, 1)
        scale = torch.logsumexp(corrected + self.forbidden, -1, keepdim=True)
        likely = torch.exp(corrected.gather(2, candidates) - scale)
        if self.target_ids is not None:
            candidates = self.target_ids[candidates]
        confidences = () if self._confidence is None else (self._confidences(hidden, markov),)
        return torch.stack(tokens, 1), torch.stack(probs, 1), candidates, likely, *confidences, corrected

    def _confidences(self, hidden: torch.Tensor, markov: list[torch.Tensor]) -> torch.Tensor:
        assert self._confidence is not None
        if self.config.confidence_with_markov:
            hidden = torch.cat((hidden, torch.stack(markov, 1)), -1)
        return self._confidence(hidden)[..., 0].float()


def inverse_cdf(probs: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """First index of each row of ``probs`` [rows, n] whose cumulative sum passes ``uniforms`` [rows] of the total."""
    sums = torch.cumsum(probs, -1)
    total = sums[:, -1:]
    passed = (sums <= uniforms[:, None] * total).sum(-1)
    last = (sums < total).sum(-1)  # rounding at the end: the last token that adds anything
    return torch.minimum(passed, last)


class _Layer:
    """One decoder layer of the draft; parameters belong to ``owner``."""

    def __init__(
        self, owner: torch.nn.Module, config: BlockConfig, weights: Mapping[str, torch.Tensor], number: int
    ) -> None:
        self._config, self._owner, self._number = config, owner, number
        prefix = f"layers.{number}."
        self._q, self._k, self._o = (Linear(owner, weights, f"{prefix}self_attn.{part}_proj") for part in "qko")
        self._v = None if config.layers.k_eq_v else Linear(owner, weights, f"{prefix}self_attn.v_proj")
        self._gate, self._up, self._down = (
            Linear(owner, weights, f"{prefix}mlp.{part}_proj") for part in ("gate", "up", "down")
        )
        self._activation = activation(config.layers.activation)
        for name in (
            "input_layernorm.weight",
            "post_attention_layernorm.weight",
            "pre_feedforward_layernorm.weight",
            "post_feedforward_layernorm.weight",
            "self_attn.q_norm.weight",
            "self_attn.k_norm.weight",
            "layer_scalar",
        ):
            if prefix + name in weights:
                owner.register_parameter(
                    self._place(name), torch.nn.Parameter(weights[prefix + name], requires_grad=False)
                )

    def _place(self, name: str) -> str:
        return f"layers_{self._number}_{name}".replace(".", "_")

    def _weight(self, name: str) -> torch.Tensor:
        found: torch.Tensor = getattr(self._owner, self._place(name))
        return found

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return rms_norm(x, self._weight(f"{name}.weight"), self._config.layers.norm_epsilon)

    def __call__(
        self,
        x: torch.Tensor,
        context: torch.Tensor,
        turn: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor,
        block_positions: torch.Tensor,
        write_indices: torch.Tensor,
        past_key: torch.Tensor,
        past_value: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        ops, layers, block = torch.ops.dspark, self._config.layers, self._config.block
        gemma = layers.family == "gemma4"
        rows = self._norm(x, "input_layernorm")
        query = rotate(
            self._norm(heads_of(self._q(rows), layers.head_dim), "self_attn.q_norm"),
            (turn[0][:, :, -block:], turn[1][:, :, -block:]),
        )
        everything = torch.cat((context, rows), 1)
        raw = heads_of(self._k(everything), layers.head_dim)
        key = rotate(self._norm(raw, "self_attn.k_norm"), turn)
        value = raw if self._v is None else heads_of(self._v(everything), layers.head_dim)
        if gemma:
            value = rms_norm(value, None, layers.norm_epsilon)
        present_key = ops.tensor_scatter(past_key, key, write_indices)
        present_value = ops.tensor_scatter(past_value, value, write_indices)
        attended = ops.attention(
            query,
            ops.cache_view(present_key, mask),
            ops.cache_view(present_value, mask),
            self._seen(mask, block_positions, write_indices, context.shape[1]),
            layers.scale,
            0.0,
        )
        attended = self._o(attended.transpose(1, 2).flatten(2))
        x = x + (self._norm(attended, "post_attention_layernorm") if gemma else attended)
        inner = self._norm(x, "pre_feedforward_layernorm" if gemma else "post_attention_layernorm")
        inner = self._down(self._activation(self._gate(inner)) * self._up(inner))
        x = x + (self._norm(inner, "post_feedforward_layernorm") if gemma else inner)
        if gemma:
            x = x * self._weight("layer_scalar")
        return x, present_key, present_value, *(part[:, :, : context.shape[1]].transpose(1, 2) for part in (key, value))

    def _seen(
        self,
        mask: torch.Tensor,
        block_positions: torch.Tensor,
        write_indices: torch.Tensor,
        features: torch.Tensor | int,
    ) -> torch.Tensor:
        """The mask of this layer: within its window, if it has one; causal inside the block if the draft wants that."""
        window = self._config.layers.windows[self._number]
        if window is None:
            return mask
        slots = torch.arange(mask.shape[-1])[None]
        inside = slots - (write_indices[:, None] + features)  # row of the block that stands in a slot
        is_block = (inside >= 0) & (inside < self._config.block)
        held = torch.gather(block_positions, 1, inside.clamp(0, self._config.block - 1))
        keys = torch.where(is_block, held, slots)
        distance = block_positions[:, :, None] - keys[:, None]
        allowed = distance < window
        if self._config.causal_windows:
            allowed = allowed & (distance >= 0)
        return mask & allowed[:, None]


class _Markov:
    """The sequential head: a correction of the logits from the token before, of rank ``markov_rank``."""

    def __init__(
        self,
        owner: torch.nn.Module,
        config: BlockConfig,
        weights: Mapping[str, torch.Tensor],
        target_ids: torch.Tensor | None,
    ) -> None:
        self._kind, self._rank, self._owner = config.markov, config.markov_rank, owner
        outer = weights["markov_head.markov_w2.weight"]
        if target_ids is not None and len(outer) != len(target_ids):
            outer = outer[target_ids]
        owner.register_parameter(
            "markov_w1", torch.nn.Parameter(weights["markov_head.markov_w1.weight"], requires_grad=False)
        )
        owner.register_parameter("markov_w2", torch.nn.Parameter(outer, requires_grad=False))
        inner = {"gated": "gate_proj", "rnn": "joint_proj"}.get(config.markov)
        self._inner = None if inner is None else Linear(owner, weights, f"markov_head.{inner}")

    def start(self, like: torch.Tensor) -> torch.Tensor | None:
        """State before the first slot; None where there is none."""
        return like.new_zeros(like.shape[0], self._rank) if self._kind == "rnn" else None

    def embed(self, previous: torch.Tensor) -> torch.Tensor:
        """Row [batch, rank] of the token drafted before."""
        return functional.embedding(previous, self._owner.markov_w1)  # type: ignore[arg-type]

    def __call__(
        self, row: torch.Tensor, hidden: torch.Tensor, state: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """float32 [batch, draft vocab] to add to the logits, and the next state."""
        inner = row
        if self._kind == "gated":
            assert self._inner is not None
            inner = torch.sigmoid(self._inner(torch.cat((hidden, row), -1))) * row
        elif self._kind == "rnn":
            assert self._inner is not None and state is not None
            gate, new, out = self._inner(torch.cat((state, row, hidden), -1)).chunk(3, -1)
            gate = torch.sigmoid(gate)
            state = gate * state + (1 - gate) * torch.tanh(new)
            inner = torch.tanh(out)
        return functional.linear(inner, self._owner.markov_w2).float(), state  # type: ignore[arg-type]
