"""DSpark and DFlash drafting for one sequence, written out step by step: the reference of the graph and the runtime.

Nothing here shares code with the package. Every round starts from all features of the text; there is no cache.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

Tensor = torch.Tensor
CANDIDATES = BEAMS = 4
"""Next tokens of a text, and texts that are followed from slot to slot."""


@dataclass
class Shape:
    """What the arithmetic needs to know of a draft."""

    layers: int
    heads: int
    kv_heads: int
    width: int
    block: int
    first_slot: int
    mask_token: int
    epsilon: float = 1e-6
    theta: float = 10000.0
    gemma: bool = False
    softcap: float | None = None
    markov: str = "none"
    confidence_with_markov: bool = False
    windows: tuple[int | None, ...] = ()
    causal: bool = False
    turned_pairs: int | None = None


def norm(x: Tensor, weight: Tensor | None, epsilon: float) -> Tensor:
    out = x / torch.sqrt((x * x).mean(-1, keepdim=True) + epsilon)
    return out if weight is None else out * weight


def turned(x: Tensor, positions: Tensor, theta: float, pairs: int | None = None) -> Tensor:
    """``x`` [rows, heads, width], its first ``pairs`` pairs turned (None: all)."""
    half = x.shape[-1] // 2
    out = x.clone()
    for pair in range(half if pairs is None else pairs):
        angle = positions.double() * theta ** (-2 * pair / x.shape[-1])
        cosine, sine = angle.cos().to(x.dtype)[:, None], angle.sin().to(x.dtype)[:, None]
        out[..., pair] = x[..., pair] * cosine - x[..., pair + half] * sine
        out[..., pair + half] = x[..., pair + half] * cosine + x[..., pair] * sine
    return out


def draft(
    shape: Shape,
    w: Mapping[str, Tensor],
    embedding: Tensor,
    head: Tensor,
    features: Tensor,
    anchor: int,
    temperature: float = 0.0,
    uniforms: Tensor | None = None,
    target_ids: Tensor | None = None,
    scale: float = 1.0,
    topk: int | None = None,
) -> dict[str, Tensor]:
    """All values of one round; ``features`` [S, taps * hidden] of the positions before the anchor's.

    ``topk``: only this many tokens of a slot, the most likely before the Markov head, may be drafted.
    """
    count = len(features)
    context = norm(features @ w["fc.weight"].T, w["hidden_norm.weight"], shape.epsilon)
    ids = torch.tensor([anchor] + [shape.mask_token] * (shape.block - 1))
    x = embedding[ids] * scale
    own = torch.arange(count)
    positions = torch.arange(count, count + shape.block)
    found: dict[str, Tensor] = {"ctx_features": context}
    for i in range(shape.layers):
        p = f"layers.{i}."

        def part(rows: Tensor, name: str, where: Tensor, p: str = p) -> Tensor:
            raw = (rows @ w[f"{p}self_attn.{name}_proj.weight"].T).reshape(len(rows), -1, shape.width)
            return turned(
                norm(raw, w[f"{p}self_attn.{name}_norm.weight"], shape.epsilon), where, shape.theta, shape.turned_pairs
            )

        def value(rows: Tensor, p: str = p) -> Tensor:
            name = f"{p}self_attn.v_proj.weight"
            raw = (rows @ w.get(name, w[f"{p}self_attn.k_proj.weight"]).T).reshape(len(rows), -1, shape.width)
            return norm(raw, None, shape.epsilon) if shape.gemma else raw

        rows = norm(x, w[f"{p}input_layernorm.weight"], shape.epsilon)
        found[f"ctx_keys.{i}"], found[f"ctx_values.{i}"] = part(context, "k", own), value(context)
        keys = torch.cat([found[f"ctx_keys.{i}"], part(rows, "k", positions)])
        values = torch.cat([found[f"ctx_values.{i}"], value(rows)])
        query = part(rows, "q", positions)
        out = torch.zeros(shape.block, shape.heads, shape.width, dtype=x.dtype)
        for head_number in range(shape.heads):
            group = head_number // (shape.heads // shape.kv_heads)
            scores = query[:, head_number] @ keys[:, group].T * (1.0 if shape.gemma else 1 / math.sqrt(shape.width))
            distance = positions[:, None] - torch.cat([own, positions])[None]
            window = shape.windows[i] if shape.windows else None
            if window is not None:
                scores = scores.masked_fill(distance >= window, -math.inf)
                if shape.causal:
                    scores = scores.masked_fill(distance < 0, -math.inf)
            out[:, head_number] = torch.softmax(scores, -1) @ values[:, group]
        attended = out.reshape(shape.block, -1) @ w[f"{p}self_attn.o_proj.weight"].T
        if shape.gemma:
            attended = norm(attended, w[f"{p}post_attention_layernorm.weight"], shape.epsilon)
        x = x + attended
        before = "pre_feedforward_layernorm" if shape.gemma else "post_attention_layernorm"
        inner = norm(x, w[f"{p}{before}.weight"], shape.epsilon)
        gate = inner @ w[f"{p}mlp.gate_proj.weight"].T
        gate = torch.nn.functional.gelu(gate, approximate="tanh") if shape.gemma else gate * torch.sigmoid(gate)
        inner = (gate * (inner @ w[f"{p}mlp.up_proj.weight"].T)) @ w[f"{p}mlp.down_proj.weight"].T
        if shape.gemma:
            inner = norm(inner, w[f"{p}post_feedforward_layernorm.weight"], shape.epsilon)
        x = x + inner
        if shape.gemma:
            x = x * w[f"{p}layer_scalar"]
    hidden = norm(x, w["norm.weight"], shape.epsilon)[shape.first_slot :]
    base = hidden @ head.T
    if shape.softcap is not None:
        base = torch.tanh(base / shape.softcap) * shape.softcap
    found |= {"block_hidden": hidden, "base_logits": base}

    def corrected_slot(slot: int, previous: int, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of a slot after a token, the rows its confidence is made from, and the state after it."""
        logits = base[slot]
        extra = hidden[slot]
        if shape.markov != "none":
            row = w["markov_head.markov_w1.weight"][previous]
            inner = row
            if shape.markov == "gated":
                gate_input = torch.cat([hidden[slot], row])
                gate = gate_input @ w["markov_head.gate_proj.weight"].T + w["markov_head.gate_proj.bias"]
                inner = torch.sigmoid(gate) * row
            if shape.markov == "rnn":
                joint = torch.cat([state, row, hidden[slot]]) @ w["markov_head.joint_proj.weight"].T
                u, c, o = (joint + w["markov_head.joint_proj.bias"]).chunk(3)
                state = torch.sigmoid(u) * state + (1 - torch.sigmoid(u)) * torch.tanh(c)
                inner = torch.tanh(o)
            outer = w["markov_head.markov_w2.weight"]
            if target_ids is not None and len(outer) != len(target_ids):
                outer = outer[target_ids]
            logits = logits + outer @ inner
            if shape.confidence_with_markov:
                extra = torch.cat([hidden[slot], row])
        if topk is not None:
            order = [int(place) for place in torch.argsort(base[slot], descending=True) if place not in mask_places]
            logits = torch.full_like(logits, -math.inf).scatter(0, torch.tensor(order[:topk]), logits[order[:topk]])
        return logits, extra, state

    def over_allowed(logits: Tensor, heat: float = 1.0) -> Tensor:
        allowed = logits.clone()
        allowed[mask_places] = -math.inf
        return torch.softmax(allowed.double() / heat, -1)

    ids_of = range(len(base[0])) if target_ids is None else target_ids.tolist()
    mask_places = [place for place, token in enumerate(ids_of) if token == shape.mask_token]
    tokens: list[int] = []
    corrected: list[Tensor] = []
    confidences: list[Tensor] = []
    probs: list[Tensor] = []
    likely: list[Tensor] = []
    previous = anchor
    start = torch.zeros(w["markov_head.markov_w1.weight"].shape[1]) if shape.markov == "rnn" else torch.empty(0)
    state = start
    for slot in range(len(hidden)):
        logits, extra, state = corrected_slot(slot, previous, state)
        if "confidence_head.proj.weight" in w:
            confidences.append((w["confidence_head.proj.weight"] @ extra + w["confidence_head.proj.bias"])[0])
        corrected.append(logits)
        likely.append(over_allowed(logits))
        if temperature > 0:
            assert uniforms is not None
            probs.append(over_allowed(logits, temperature))
            index = int((torch.cumsum(probs[-1], 0) <= float(uniforms[slot])).sum())
        else:
            index = int(torch.argmax(likely[-1]))
        previous = ids_of[index]
        tokens.append(previous)
    # Texts followed from slot to slot: (chance, last node, last token, state before the next slot).
    texts = [(1.0, -1, anchor, start)]
    nodes: list[tuple[int, float, int]] = []
    for slot in range(len(hidden)):
        further = []
        for reach, above, last, before in texts:
            logits, _, after = corrected_slot(slot, last, before)
            chances, places = over_allowed(logits).sort(descending=True)
            for chance, place in zip(chances[:CANDIDATES].tolist(), places[:CANDIDATES].tolist(), strict=True):
                further.append((reach * chance, len(nodes), ids_of[place], after))
                nodes.append((ids_of[place], chance, above))
        texts = sorted(further, key=lambda text: -text[0])[:BEAMS]
    found["beam_tokens"], found["beam_parents"] = (torch.tensor([node[i] for node in nodes]) for i in (0, 2))
    found["beam_probs"] = torch.tensor([node[1] for node in nodes])
    found |= {"draft_tokens": torch.tensor(tokens), "corrected_logits": torch.stack(corrected)}
    if confidences:
        found["confidence_logits"] = torch.stack(confidences)
    likely_probs, likely_ids = torch.stack(likely).sort(-1, descending=True)
    found["candidate_probs"] = likely_probs[:, :CANDIDATES].to(base.dtype)
    found["candidate_tokens"] = (likely_ids if target_ids is None else target_ids[likely_ids])[:, :CANDIDATES]
    if probs:
        found["draft_probs"] = torch.stack(probs)
    return found
