"""The sequential head of a DSpark drafter: a low-rank correction of a slot's logits, given the token drafted before."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional

from dspark_export.drafts.formats.draft import BlockConfig
from dspark_export.drafts.modules.layers import Weights, keep


class MarkovStep(NamedTuple):
    """``row`` [batch, rank]: raw embedding of the token before. ``inner`` [batch, rank]: what W2 is applied to."""

    row: torch.Tensor
    inner: torch.Tensor
    state: torch.Tensor | None


_TABLE, _DRAFTED = "markov_head.markov_w1.weight", "markov_head.markov_w1.drafted.weight"
_MIXING = {"gated": "markov_head.gate_proj", "rnn": "markov_head.joint_proj"}


class MarkovHead:
    """W1 (rows by target id), the mixing of a row with the slot's hidden state, and W2 (rows by draft id).

    The hidden state's share of the mixing is computed for all slots at once, before the first token is known. With a
    draft vocabulary, W1's rows of those tokens are in a separate table, so that a drafted token is looked up directly.
    """

    def __init__(
        self, owner: torch.nn.Module, config: BlockConfig, weights: Weights, target_ids: torch.Tensor | None
    ) -> None:
        self._kind, self._rank, self._owner = config.markov, config.markov_rank, owner
        outer = weights["markov_head.markov_w2.weight"]
        if target_ids is not None and len(outer) != len(target_ids):
            outer = outer[target_ids]
        table = weights[_TABLE]
        keep(owner, _TABLE, table)
        self._drafted = _TABLE if target_ids is None else _DRAFTED
        if target_ids is not None:
            keep(owner, _DRAFTED, table[target_ids])
        keep(owner, "markov_head.markov_w2.weight", outer)
        inner = _MIXING.get(config.markov)
        if inner is not None:
            joint, width = weights[f"{inner}.weight"], config.layers.hidden_size
            # Inputs of the gated head: hidden, row. Of the recurrent one: state, row, hidden.
            first = config.markov == "gated"
            of_hidden, of_rest = (
                (joint[:, :width], joint[:, width:]) if first else (joint[:, -width:], joint[:, :-width])
            )
            keep(owner, f"{inner}.hidden.weight", of_hidden.contiguous())
            keep(owner, f"{inner}.recurrent.weight", of_rest.contiguous())
            keep(owner, f"{inner}.bias", weights[f"{inner}.bias"])

    def prepare(self, hidden: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """What each slot of ``hidden`` [batch, slots, width] adds to the mixing, [batch, ...] a slot."""
        inner = _MIXING.get(self._kind)
        if inner is None:
            return (None,) * hidden.shape[1]
        weight, bias = (self._owner.get_parameter(f"{inner}.{part}") for part in ("hidden.weight", "bias"))
        return functional.linear(hidden, weight, bias).unbind(1)

    def start(self, like: torch.Tensor) -> torch.Tensor | None:
        """State before the first slot of a batch of the size of ``like``; None where the head keeps none."""
        return like.new_zeros(like.shape[0], self._rank) if self._kind == "rnn" else None

    def __call__(
        self,
        previous: torch.Tensor,
        prepared: torch.Tensor | None,
        state: torch.Tensor | None,
        drafted: bool = False,
    ) -> MarkovStep:
        """One slot, ``previous`` int64 [batch, 1]: the tokens before, draft ids if they were ``drafted``, else those of
        the target."""
        row = functional.embedding(previous, self._owner.get_parameter(self._drafted if drafted else _TABLE)).flatten(1)
        if prepared is None:
            return MarkovStep(row, row, None)
        inner = _MIXING[self._kind]
        weight = self._owner.get_parameter(f"{inner}.recurrent.weight")
        if state is None:
            return MarkovStep(row, torch.sigmoid(prepared + functional.linear(row, weight)) * row, None)
        mixed = prepared + functional.linear(torch.cat((state, row), -1), weight)
        gate, new, out = mixed.chunk(3, -1)
        gate = torch.sigmoid(gate)
        return MarkovStep(row, torch.tanh(out), gate * state + (1 - gate) * torch.tanh(new))

    def corrected(self, base: torch.Tensor, inner: torch.Tensor) -> torch.Tensor:
        """Logits ``base`` float32 [batch, draft vocab] of a slot with the correction added."""
        outer = self._owner.get_parameter("markov_head.markov_w2.weight")
        if outer.dtype == base.dtype:
            return torch.addmm(base, inner, outer.t())
        return base + functional.linear(inner, outer).float()

    def outer_rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows of W2 for draft ids [batch, slots, k]: [batch, slots, k, rank]."""
        return functional.embedding(ids, self._owner.get_parameter("markov_head.markov_w2.weight"))
