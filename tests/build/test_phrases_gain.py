"""What each table of phrases adds, on a model of 5 million weights that has learnt to tell recipes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dspark_export.build.options import BuildOptions
from dspark_export.build.phrases import OWN, accepted_length, answered_texts, corpus_of, own_texts
from dspark_export.build.pipeline import build
from dspark_export.prompts.texts import encode
from dspark_runtime import Bundle
from dspark_runtime.phrases.store import PhraseOptions, PhraseStore
from tests import tiny_models

DISHES = ("soup", "bread", "salad", "pie", "stew", "cake", "rice", "tart", "curry", "pasta", "broth", "pudding")
THINGS = ("onions", "apples", "beans", "carrots", "mushrooms", "tomatoes", "lentils", "pears", "leeks", "plums")
WAYS = ("slowly", "gently", "twice", "at once", "for an hour", "with care", "without a lid", "in the morning")
STEPS = (
    "Wash the {thing} and cut them into small pieces, {way}.",
    "Melt some butter in a large pan and add the {thing}.",
    "Pour in two cups of water and let it boil {way}.",
    "Season the {dish} with salt and a little pepper.",
    "Stir the {dish} {way} until it is thick and smooth.",
    "Serve the {dish} warm, with the rest of the {thing} on top.",
    "Put the {dish} aside and let it cool {way}.",
)


def recipe(random: np.random.Generator) -> tuple[str, str]:
    """A question and its answer, which names the dish and the thing again and again."""
    dish, thing = random.choice(DISHES), random.choice(THINGS)
    steps = random.choice(len(STEPS), 4, replace=False)
    said = " ".join(STEPS[step].format(dish=dish, thing=thing, way=random.choice(WAYS)) for step in steps)
    return f"How do I make {dish} with {thing}?", f"For {dish} with {thing}: {said}"


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("recipes")
    sizes: dict[str, Any] = {
        "num_hidden_layers": 6,
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_attention_heads": 4,
    }
    _, model = tiny_models.make("llama", **sizes, num_key_value_heads=2, head_dim=64, max_position_embeddings=512)
    assert 4e6 < sum(parameter.numel() for parameter in model.parameters()) < 1e7
    tokenizer, random = tiny_models.tokenizer(model.config.vocab_size), np.random.default_rng(0)
    model.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(300):
        texts = [recipe(random) for _ in range(8)]
        rows = [tokenizer.encode(f"<|user|>{asked}<|end|>\n<|assistant|>{said}<|end|>") for asked, said in texts]
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=-100)
        loss = model(input_ids=ids.clamp_min(0), labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 1.0
    model.eval().save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    build(BuildOptions(model=str(folder / "model"), out=folder / "bundle", self_draft="none"))
    return Bundle.open(folder / "bundle")


@pytest.mark.slow
def test_every_table_adds_something(opened: Bundle) -> None:
    vocab, random = opened.manifest.model.vocab_size, np.random.default_rng(1)
    asked = list(dict.fromkeys(recipe(random)[0] for _ in range(24)))
    texts = answered_texts(opened, asked)
    corpus = corpus_of(own_texts(opened, 8), vocab, OWN)

    def length(with_corpus: bool, with_history: bool) -> float:
        options = PhraseOptions(history=PhraseOptions.history if with_history else 0)
        return accepted_length(PhraseStore(vocab, corpus.packed if with_corpus else None, options), texts)

    text, history, own, everything = (length(*tables) for tables in ((0, 0), (0, 1), (1, 0), (1, 1)))  # type: ignore[arg-type]
    print(f"D {text:.2f}, D + H {history:.2f}, D + C {own:.2f}, D + H + C {everything:.2f} tokens a round")
    assert text > 1.1
    assert history > 1.05 * text
    assert own > 1.05 * text
    assert everything > 1.02 * max(history, own)
    assert corpus.gain is not None and corpus.gain.with_corpus > corpus.gain.without
    for prompt in asked[:6]:  # and none of them has a say in the text
        ids = encode(opened, prompt)
        plain = opened.generate(ids, max_new_tokens=60, speculate="off")
        for speculate in ("store", "auto"):
            assert opened.generate(ids, max_new_tokens=60, speculate=speculate).tokens == plain.tokens
