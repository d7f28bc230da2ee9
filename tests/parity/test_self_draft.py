"""The self-draft graph against a plain transformers model from which the other layers were taken out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from dspark_export.graphs.decoder import decoder_layers
from tests.parity.conftest import DRAFT_LAYERS, Exported
from tests.parity.harness import GraphRunner, Tree, assert_close, plain_logits
from tests.tiny_models import ARCHITECTURES, VOCAB, WINDOW

Export = Callable[[str], Exported]
every_architecture = pytest.mark.parametrize("arch", ARCHITECTURES)


def without_other_layers(model: PreTrainedModel, layers: Sequence[int]) -> PreTrainedModel:
    """``model`` with only ``layers``, renumbered, as a checkpoint of a shallower model would be."""
    cut = copy.deepcopy(model)
    stack = decoder_layers(cut)
    kept = [stack[n] for n in layers]
    for number, layer in enumerate(kept):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = number
    del stack[:]
    stack.extend(kept)
    cut.config.num_hidden_layers = len(layers)
    if getattr(cut.config, "layer_types", None):
        cut.config.layer_types = [model.config.layer_types[n] for n in layers]
    return cut


def text(rng: np.random.Generator, length: int) -> list[int]:
    return [int(t) for t in rng.integers(3, VOCAB, length)]


@every_architecture
def test_alone_it_is_the_shallower_model(arch: str, exported: Export) -> None:
    made, rng = exported(arch), np.random.default_rng(1)
    cut = without_other_layers(made.model, DRAFT_LAYERS)
    prompt = text(rng, 2 * WINDOW + 2)
    runner, found = GraphRunner(made.self_draft, batch=1), []
    for start, end in ((0, 7), (7, 8), (8, len(prompt))):
        chunk = Tree.chain(prompt[start:end])
        found.append(runner.step([chunk])[0])
        runner.commit(0, chunk, len(chunk.tokens) - 1)
    assert_close(np.concatenate(found), plain_logits(cut, prompt))


@every_architecture
def test_it_reads_the_cache_the_target_wrote(arch: str, exported: Export) -> None:
    """Drafting a chain and a tree after a text the target prefilled, in a ragged batch, all in the target's cache."""
    made, rng = exported(arch), np.random.default_rng(2)
    cut = without_other_layers(made.model, DRAFT_LAYERS)
    texts = [text(rng, WINDOW + 4), text(rng, 3)]
    target = GraphRunner(made.target, batch=2)
    prompts = [Tree.chain(tokens) for tokens in texts]
    target.step(prompts)
    for b, prompt in enumerate(prompts):
        target.commit(b, prompt, len(prompt.tokens) - 1)
    draft = GraphRunner(made.self_draft, batch=2, caches=target)
    trees = [Tree.random(rng, size, VOCAB) for size in (6, 4)]
    for b, logits in enumerate(draft.step(trees)):
        for leaf in set(range(len(trees[b].tokens))) - set(trees[b].parents):
            path = trees[b].path(leaf)
            wanted = drafted(made.model, cut, texts[b], [trees[b].tokens[i] for i in path])
            assert_close(logits[path], wanted)


@every_architecture
def test_its_scratch_rows_leave_no_trace_in_the_targets_logits(arch: str, exported: Export) -> None:
    made, rng = exported(arch), np.random.default_rng(3)
    prompt, tree = Tree.chain(text(rng, WINDOW + 1)), Tree.random(rng, 5, VOCAB)
    found = []
    for draft_first in (False, True):
        target = GraphRunner(made.target, batch=1)
        target.step([prompt])
        target.commit(0, prompt, len(prompt.tokens) - 1)
        if draft_first:
            GraphRunner(made.self_draft, batch=1, caches=target).step([Tree.random(rng, 9, VOCAB)])
        found.append(target.step([tree])[0])
    assert np.array_equal(found[0], found[1])


@torch.no_grad()
def drafted(model: PreTrainedModel, cut: PreTrainedModel, prefix: Sequence[int], path: Sequence[int]) -> np.ndarray:
    """Logits of ``path`` from the shallower model, on the keys and values the whole model left for ``prefix``."""
    whole, shallow = DynamicCache(), DynamicCache()
    model(input_ids=torch.tensor([list(prefix)]), past_key_values=whole, use_cache=True)
    for number, layer in enumerate(DRAFT_LAYERS):
        shallow.update(whole.layers[layer].keys, whole.layers[layer].values, number)
    logits: np.ndarray = (
        cut(input_ids=torch.tensor([list(path)]), past_key_values=shallow, use_cache=True).logits[0].numpy()
    )
    return logits
