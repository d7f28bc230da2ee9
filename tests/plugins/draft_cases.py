"""Random blocks to draft, and the drafters' own Markov head as their reference."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from dspark_export.drafts.modules.markov import MarkovHead
from tests.plugins.host_library import DTYPES, Array


@dataclass
class Reference:
    """Corrected logits, probabilities [batch, drafts, vocab], confidence logits [batch, drafts] for given tokens."""

    logits: Array
    probs: Array
    confidences: Array | None


def draft_case(rng: np.random.Generator, kind: str, dtype: str, *, mapped: bool, confident: str) -> dict[str, Array]:
    """Inputs of DraftBlock. ``confident``: none, hidden (reads the hidden row) or token (and the embedding)."""
    batch, drafts = int(rng.integers(1, 5)), int(rng.integers(1, 6))
    rank, hidden = int(rng.choice([1, 8, 12, 24, 300])), int(rng.choice([5, 16, 40]))
    vocab, embeddings = int(rng.choice([1, 9, 64, 150])), 160
    wide = DTYPES[dtype][1]

    def normal(*shape: int, scale: float = 1.0) -> Array:
        return np.ascontiguousarray(rng.normal(0, scale, shape).astype(wide))

    case = {
        "base_logits": normal(batch, drafts, vocab, scale=2.0),
        "hidden_rows": normal(batch, drafts, hidden),
        "anchors": rng.integers(0, embeddings, batch),
        "temperature": np.where(rng.random(batch) < 0.4, 0, rng.choice([0.5, 1.0, 1.6], batch)).astype(np.float32),
        "uniforms": rng.random((batch, drafts)).astype(np.float32),
    }
    if kind != "none" or confident == "token":
        case["w1"] = normal(embeddings, rank)
    if kind != "none":
        case["w2"] = normal(vocab, rank, scale=rank**-0.5)
    if kind == "gated":
        case |= {"mix": normal(rank, hidden + rank, scale=0.3), "mix_bias": normal(rank)}
    if kind == "rnn":
        case |= {"mix": normal(3 * rank, 2 * rank + hidden, scale=0.3), "mix_bias": normal(3 * rank)}
    if confident != "none":
        case["confidence"] = normal(hidden + (rank if confident == "token" else 0), scale=0.3)
        case["confidence_bias"] = normal(1)
    if mapped:
        case["token_map"] = rng.permutation(embeddings)[:vocab]
    return case


def _tensor(array: Array) -> torch.Tensor:
    return torch.from_numpy(array.astype(np.float32))


def reference(kind: str, case: dict[str, Array], tokens: Array) -> Reference:
    """What the drafters' modules compute in float32 when the tokens drafted are ``tokens`` [batch, drafts]."""
    base, hidden = _tensor(case["base_logits"]), _tensor(case["hidden_rows"])
    drafts = tokens.shape[1]
    previous = torch.from_numpy(np.concatenate([case["anchors"][:, None], tokens[:, :-1]], 1))
    rows, logits = [], base
    if kind != "none":
        weights = {"markov_head.markov_w1.weight": "w1", "markov_head.markov_w2.weight": "w2"}
        mixing = {"gated": "gate_proj", "rnn": "joint_proj"}.get(kind)
        if mixing is not None:
            weights |= {f"markov_head.{mixing}.weight": "mix", f"markov_head.{mixing}.bias": "mix_bias"}
        config: Any = SimpleNamespace(
            markov=kind,
            markov_rank=case["w1"].shape[1],
            layers=SimpleNamespace(hidden_size=hidden.shape[-1]),
        )
        head = MarkovHead(torch.nn.Module(), config, {k: _tensor(case[v]) for k, v in weights.items()}, None)
        prepared, state = head.prepare(hidden), head.start(hidden)
        corrected = []
        for slot in range(drafts):
            row, inner, state = head(previous[:, slot : slot + 1], prepared[slot], state)
            rows.append(row)
            corrected.append(head.corrected(base[:, slot], inner))
        logits = torch.stack(corrected, 1)
    heat = torch.from_numpy(case["temperature"])[:, None, None]
    one_hot = torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    probs = torch.where(heat > 0, torch.softmax(logits / heat.clamp_min(1e-3), -1), one_hot)
    confidences = None
    if "confidence" in case:
        read = hidden
        if len(case["confidence"]) > hidden.shape[-1]:
            embedded = torch.stack(rows, 1) if rows else _tensor(case["w1"])[previous]
            read = torch.cat((hidden, embedded), -1)
        confidences = (read @ _tensor(case["confidence"]) + _tensor(case["confidence_bias"])).numpy()
    return Reference(logits.numpy(), probs.numpy(), confidences)
