"""Measuring and choosing a self-draft in PyTorch."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from dspark_export.graphs import self_draft_choice
from dspark_export.graphs.draft_probe import DraftProbe
from dspark_export.graphs.self_draft_choice import LayerCosts, agreement, choose, predict
from dspark_runtime.errors import UsageError
from tests import tiny_models
from tests.parity.test_self_draft import without_other_layers

EFFORT = self_draft_choice.Effort(prompts=3, tokens=6, single_layers=4)


@pytest.mark.parametrize("arch", ["llama", "gemma2", "deepseek_v2", "gpt2", "mixtral"])
def test_all_layers_agree_with_themselves(arch: str) -> None:
    _, model = tiny_models.make(arch)
    assert agreement(model, tiny_models.tokenizer().backend_tokenizer, range(tiny_models.LAYERS)) == 1.0


@pytest.mark.parametrize("arch", ["llama", "mistral", "gemma3_text", "smollm3"])
@pytest.mark.parametrize("layers", [(0,), (0, 2), (1,), (0, 1)])
def test_agreement_is_that_of_single_draft_steps_on_the_targets_cache(arch: str, layers: tuple[int, ...]) -> None:
    """Position by position: the target's cache up to a token, then the shallower model on that token."""
    _, model = tiny_models.make(arch, seed=3)
    probe = DraftProbe(model, tiny_models.tokenizer().backend_tokenizer, prompts=2, tokens=5)
    cut = without_other_layers(model, layers)
    agreed, total = 0, 0
    with torch.no_grad():
        for row in probe._ids:
            for end in range(len(row) - 6, len(row) - 1):
                whole, shallow = DynamicCache(), DynamicCache()
                model(input_ids=row[None, :end], past_key_values=whole, use_cache=True)
                wanted = model(input_ids=row[None, : end + 1], use_cache=False).logits[0, -1].argmax()
                for number, layer in enumerate(layers):
                    shallow.update(whole.layers[layer].keys, whole.layers[layer].values, number)
                drafted = cut(input_ids=row[None, end : end + 1], past_key_values=shallow, use_cache=True)
                agreed += int(drafted.logits[0, -1].argmax() == wanted)
                total += 1
    assert probe.agreement(layers) == pytest.approx(agreed / total)


@pytest.mark.parametrize("arch", ["llama", "gemma2", "qwen3_moe"])
def test_a_draft_can_go_layer_by_layer(arch: str) -> None:
    """Step by step through some layers is the pass over those layers, and through all of them the target's own."""
    _, model = tiny_models.make(arch, seed=3)
    probe = DraftProbe(model, tiny_models.tokenizer().backend_tokenizer, prompts=2, tokens=5)
    for layers in ((0, 2), (1,), (0, 1, 2)):
        hidden = probe.hidden[0]
        for number in layers:
            hidden = probe.layer(number, hidden)
        drafted = probe.tokens(hidden)
        assert torch.equal(drafted == probe.wanted, probe.agrees(layers))
    assert torch.equal(drafted, probe.wanted)
    torch.testing.assert_close(hidden, probe.hidden[-1])


def test_measuring_leaves_the_model_as_it_was() -> None:
    _, model = tiny_models.make("qwen3_moe")
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        before = model(input_ids=ids).logits
        choose(model, tiny_models.tokenizer().backend_tokenizer, EFFORT)
        assert torch.equal(model(input_ids=ids).logits, before)


def test_a_random_model_has_no_self_draft_that_pays() -> None:
    _, model = tiny_models.make("llama", num_hidden_layers=6)
    choice = choose(model, tiny_models.tokenizer().backend_tokenizer, EFFORT)
    assert choice.layers
    assert choice.relative_cost < 1
    assert choice.speedup == predict(choice.layers, choice.agreement, choice.relative_cost).speedup
    assert choice.pays == (choice.speedup > 1)


def test_layers_that_do_nothing_are_found_and_left_out() -> None:
    """With every layer but the first and the last made a no-op, the choice must do without most of them, and pay."""
    _, model = tiny_models.make("llama", num_hidden_layers=10)
    with torch.no_grad():
        for layer in model.model.layers[1:9]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    choice = choose(model, tiny_models.tokenizer().backend_tokenizer, EFFORT)
    assert choice.agreement == 1.0
    assert choice.pays
    assert {0, 9} <= set(choice.layers)
    assert len(choice.layers) <= 7


def test_prediction() -> None:
    sure = predict((0,), 1.0, 0.1)
    assert sure.draft_tokens == self_draft_choice.MAX_DRAFT_TOKENS
    assert sure.tokens_per_pass == pytest.approx(9)
    assert sure.speedup == pytest.approx(9 / (1 + 8 * 0.14))
    never = predict((0,), 0.0, 0.5)
    assert (never.draft_tokens, never.tokens_per_pass, never.pays) == (1, 1.0, False)


def test_costs_count_weights() -> None:
    _, model = tiny_models.make("llama", num_hidden_layers=4)
    costs = LayerCosts.of(model)
    assert costs.relative(range(4)) == 1.0
    assert costs.relative((0, 1)) == pytest.approx(
        (2 * costs.layers[0] + costs.head) / (4 * costs.layers[0] + costs.head)
    )


def test_layers_that_do_not_exist_are_refused() -> None:
    _, model = tiny_models.make("llama")
    with pytest.raises(UsageError, match="layers 0 to 2"):
        agreement(model, tiny_models.tokenizer().backend_tokenizer, (0, 7))
