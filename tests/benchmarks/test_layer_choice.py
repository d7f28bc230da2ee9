"""What choosing layers while running could gain: the figures of a model whose answer is known."""

from __future__ import annotations

import torch

from benchmarks.layer_choice import by_token, evenly, least_important, searched
from dspark_export.graphs.draft_probe import DraftProbe
from tests import tiny_models


def test_a_layer_that_does_nothing_is_left_out() -> None:
    """One of four layers adds nothing to the hidden state: without it, every draft is right, however it is found."""
    _, model = tiny_models.make("llama", num_hidden_layers=4)
    with torch.no_grad():
        model.model.layers[2].self_attn.o_proj.weight.zero_()
        model.model.layers[2].mlp.down_proj.weight.zero_()
    probe = DraftProbe(model, tiny_models.tokenizer().backend_tokenizer, prompts=3, tokens=8)
    alone = {n: probe.agreement([m for m in range(4) if m != n]) for n in (1, 2)}
    assert least_important(probe, 3, alone) == (0, 1, 3)
    assert searched(probe, 3, (0, 2, 3), tries=30, seed=1) == 1.0
    assert by_token(probe, 3) == 1.0
    assert by_token(probe, 4) == 1.0 and by_token(probe, 1) < 1.0
    assert evenly(30, 4) == (0, 10, 19, 29)
