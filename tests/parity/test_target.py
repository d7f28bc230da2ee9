"""The exported target against the plain transformers model: prefill, tree verification, chunks, poison, batches."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from dspark_export.graphs.decoder import decoder_layers
from tests.parity.conftest import TAPS, Exported
from tests.parity.harness import CAPACITY, GraphRunner, Tree, assert_close, plain_logits, tree_logits
from tests.tiny_models import ARCHITECTURES, VOCAB, WINDOW

Export = Callable[[str], Exported]
every_architecture = pytest.mark.parametrize("arch", ARCHITECTURES)


def text(rng: np.random.Generator, length: int) -> list[int]:
    return [int(t) for t in rng.integers(3, VOCAB, length)]


@every_architecture
def test_prefill_and_tree_steps_of_a_ragged_batch(arch: str, exported: Export) -> None:
    made, rng = exported(arch), np.random.default_rng(1)
    runner = GraphRunner(made.target, batch=2)
    committed = [text(rng, 5), text(rng, 2 * WINDOW + 3)]
    prompts = [Tree.chain(tokens) for tokens in committed]
    for b, logits in enumerate(runner.step(prompts)):
        assert_close(logits, plain_logits(made.model, committed[b]))
        runner.commit(b, prompts[b], len(committed[b]) - 1)
    for sizes in ((7, 4), (3, 9), (1, 6), (8, 8)):
        trees = [Tree.random(rng, size, VOCAB) for size in sizes]
        for b, logits in enumerate(runner.step(trees)):
            assert_close(logits, tree_logits(made.model, committed[b], trees[b]))
            committed[b] += runner.commit(b, trees[b], int(rng.integers(len(trees[b].tokens))))


@every_architecture
def test_prefill_may_be_split_anywhere(arch: str, exported: Export) -> None:
    made, rng = exported(arch), np.random.default_rng(2)
    prompt = text(rng, 2 * WINDOW + 5)
    wanted = plain_logits(made.model, prompt)
    for splits in ((1,), (WINDOW,), (WINDOW + 1, WINDOW + 2), (3, 6, 9, 12, 15, 18), (len(prompt) - 1,)):
        runner, found = GraphRunner(made.target, batch=1), []
        for start, end in zip((0, *splits), (*splits, len(prompt)), strict=True):
            chunk = Tree.chain(prompt[start:end])
            found.append(runner.step([chunk])[0])
            runner.commit(0, chunk, len(chunk.tokens) - 1)
        assert_close(np.concatenate(found), wanted)


@every_architecture
@pytest.mark.parametrize("poison", [np.nan, 1e4])
def test_slots_past_the_text_are_never_read(arch: str, poison: float, exported: Export) -> None:
    made, rng = exported(arch), np.random.default_rng(3)
    prompt = Tree.chain(text(rng, WINDOW + 3))
    trees = [Tree.random(rng, 6, VOCAB) for _ in range(2)]
    found = []
    for fill in (0.0, poison):
        runner = GraphRunner(made.target, batch=1, fill=fill)
        logits = [runner.step([prompt])[0]]
        runner.commit(0, prompt, len(prompt.tokens) - 1)
        for tree in trees:
            runner.poison(fill, runner.lengths)
            logits.append(runner.step([tree])[0])
            runner.commit(0, tree, 5)
        found.append(np.concatenate(logits))
    assert np.array_equal(found[0], found[1])


@every_architecture
def test_stale_rows_of_a_shorter_sequence_are_harmless(arch: str, exported: Export) -> None:
    """In a ragged batch the slots between a short sequence's end and ``kv_len`` hold what was there before."""
    made, rng = exported(arch), np.random.default_rng(4)
    prompts = [Tree.chain(text(rng, n)) for n in (3, 2 * WINDOW)]
    trees = [Tree.random(rng, 5, VOCAB) for _ in range(2)]
    found = []
    for fill in (0.0, 1e4):
        runner = GraphRunner(made.target, batch=2)
        runner.step(prompts)
        for b, prompt in enumerate(prompts):
            runner.commit(b, prompt, len(prompt.tokens) - 1)
        runner.poison(fill, runner.lengths)
        found.append(np.concatenate(runner.step(trees)))
    assert np.array_equal(found[0], found[1])


@every_architecture
def test_order_of_siblings_and_of_sequences_means_nothing(arch: str, exported: Export) -> None:
    made, rng = exported(arch), np.random.default_rng(5)
    prompts = [Tree.chain(text(rng, n)) for n in (WINDOW + 2, 4)]
    tree = Tree((10, 20, 30, 40, 50), (-1, 0, 0, 1, 2))
    mirrored = Tree((10, 30, 20, 50, 40), (-1, 0, 0, 1, 2))
    runs = []
    for order, trees in (((0, 1), (tree, mirrored)), ((1, 0), (tree, mirrored))):
        runner = GraphRunner(made.target, batch=2)
        runner.step([prompts[b] for b in order])
        for place, b in enumerate(order):
            runner.commit(place, prompts[b], len(prompts[b].tokens) - 1)
        logits = runner.step(list(trees))
        runs.append([logits[order.index(b)] for b in (0, 1)])
    swapped = [0, 2, 1, 4, 3]
    for b in (0, 1):
        assert_close(runs[0][b][swapped], runs[1][b])


@every_architecture
def test_only_the_asked_rows_come_out(arch: str, exported: Export) -> None:
    made, rng = exported(arch), np.random.default_rng(6)
    prompt = text(rng, 9)
    n = len(prompt)
    runner = GraphRunner(made.target, batch=1)
    mask = np.tril(np.ones((n, n), bool))[None, None]
    rows = np.array([[8, 0, 8]])
    logits = runner.run(np.array([prompt]), np.arange(n)[None], mask, np.zeros(1, np.int64), rows)[0]
    assert logits.dtype == np.float32
    assert_close(logits[0], plain_logits(made.model, prompt)[rows[0]])
    assert n < CAPACITY


@every_architecture
def test_taps_are_the_raw_layer_outputs(arch: str, exported: Export) -> None:
    made, rng = exported(arch), np.random.default_rng(7)
    prompt = text(rng, 9)
    n = len(prompt)
    mask = np.tril(np.ones((n, n), bool))[None, None]
    runner = GraphRunner(made.target, batch=1)
    taps = runner.run(np.array([prompt]), np.arange(n)[None], mask, np.zeros(1, np.int64), np.array([[0]]))[1]
    seen: list[torch.Tensor] = []
    layers = decoder_layers(made.model)
    hooks = [layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))]
    hooks += [layers[i].register_forward_hook(lambda m, a, output: seen.append(output)) for i in TAPS if i >= 0]
    plain_logits(made.model, prompt)
    for hook in hooks:
        hook.remove()
    assert_close(taps[0], torch.cat([hidden[0] for hidden in seen], dim=-1).numpy())


@pytest.mark.parametrize("arch", ["mistral", "gemma2", "gemma3_text", "qwen2", "phi3"])
def test_the_window_moves_along_a_branch_and_not_along_the_slots(arch: str, exported: Export) -> None:
    """Two branches deeper than the window, row by row in turn: a key's slot is twice as far away as its position."""
    made, rng = exported(arch), np.random.default_rng(8)
    prompt = Tree.chain(text(rng, 3))
    size = 2 * WINDOW + 7
    tree = Tree(tuple(text(rng, size)), (-1, 0, *range(size - 2)))
    runner = GraphRunner(made.target, batch=1)
    runner.step([prompt])
    runner.commit(0, prompt, 2)
    assert max(len(tree.path(node)) for node in range(size)) > WINDOW + 2
    assert_close(runner.step([tree])[0], tree_logits(made.model, prompt.tokens, tree))
