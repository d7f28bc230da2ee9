"""An EAGLE-3 drafter over the contract of :func:`dspark_runtime.bundle.draft_contract.eagle_contract`.

Row i joins the embedding of the token after position i with the hidden state of position i: the target's projected
features in the first pass over it, the drafter's own output in a step. One decoder layer of double input width computes
the next hidden state from it.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from dspark_export.drafts.formats.draft import EagleConfig
from dspark_export.drafts.modules.decoder_layer import DraftLayer
from dspark_export.drafts.modules.layers import Linear, Norm, Rotation, Weights, keep, softcapped
from dspark_export.tracing.seams import within_window


class EagleModule(torch.nn.Module):
    """See the module's text.

    Args:
        config: the draft.
        weights: its tensors under DeepSpec's names.
        embedding: [vocab, hidden], shared. ``head``: [draft vocab, hidden], shared or the draft's own.
        features: whether the pass reads features of the target, else hidden rows of the drafter.
        embedding_scale: what embeddings are multiplied with.
    """

    def __init__(
        self,
        config: EagleConfig,
        weights: Weights,
        *,
        embedding: torch.Tensor,
        head: torch.Tensor,
        features: bool,
        embedding_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self._config, self._scale = config, embedding_scale
        layers = config.layers
        keep(self, "embed_tokens.weight", embedding)
        self._head = "embed_tokens.weight" if head is embedding else "lm_head.weight"
        if head is not embedding:
            keep(self, self._head, head)
        self._fc = Linear(self, weights, "fc") if features else None
        self._layer = DraftLayer(self, layers, weights, 0)
        self._hidden_norm = Norm(self, weights, "layers.0.hidden_norm", layers.norm_epsilon)
        self._norm = Norm(self, weights, "norm", layers.norm_epsilon)
        self.rotation = Rotation(layers, embedding.dtype)

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The contract's outputs."""
        ids, hidden, positions, mask, write_indices, logit_rows, past_key, past_value = inputs
        layers = self._config.layers
        embedded = functional.embedding(ids, self.get_parameter("embed_tokens.weight"))
        if self._scale != 1.0:
            embedded = embedded * self._scale
        if self._fc is not None:
            hidden = self._fc(hidden)
        normed = self._hidden_norm(hidden)
        rows = torch.cat((self._layer.input_norm(embedded), normed), -1)
        if layers.windows[0] is not None:
            mask = mask & within_window(positions, write_indices, mask.shape[-1], layers.windows[0])
        turn = self.rotation(positions)
        found = self._layer.attend(rows, rows, (turn, turn), mask, write_indices, (past_key, past_value))
        after = self._layer.finish(normed if self._config.norm_before_residual else hidden, found.rows)
        wanted = self._norm(torch.ops.dspark.gather_rows(after, logit_rows))
        logits = softcapped(functional.linear(wanted, self.get_parameter(self._head)).float(), layers.softcap)
        return logits, after, found.present_key, found.present_value
