"""The real thing: built from the GGUF, it must say sensible things, and say the same speculatively."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dspark_export.build.row_noise import row_logits
from dspark_runtime import Bundle, Generation

PROMPTS = [
    "What is the capital of France?",
    "Write a Python function that adds two numbers.",
    "Repeat this sentence three times: The red boat sails on the quiet lake in the evening.",
    "A shop sells 3 apples for 2 euros. How much do 12 apples cost?",
]
MODES = ["ngram", "self-draft", "ngram+self-draft", "auto"]


def answers(bundle: Bundle, mode: str, **options: object) -> list[Generation]:
    return [bundle.generate(p, chat=True, max_new_tokens=48, speculate=mode, **options) for p in PROMPTS]


@pytest.fixture(scope="module")
def plain(fp32: Bundle) -> list[tuple[int, ...]]:
    return [tuple(g.tokens) for g in answers(fp32, "off")]


def test_it_answers(fp32: Bundle) -> None:
    assert "Paris" in fp32.generate(PROMPTS[0], chat=True, max_new_tokens=32).text
    assert "def " in fp32.generate(PROMPTS[1], chat=True, max_new_tokens=64).text


def test_the_tokenizer_splits_digits(fp32: Bundle) -> None:
    tokenizer = fp32.codec.tokenizer
    pieces = [tokenizer.decode([i]) for i in tokenizer.encode("a\n\n123").ids]
    assert pieces[-3:] == ["1", "2", "3"]


@pytest.mark.parametrize("mode", MODES)
def test_greedy_speculation_changes_nothing(fp32: Bundle, plain: list[tuple[int, ...]], mode: str) -> None:
    assert [tuple(g.tokens) for g in answers(fp32, mode)] == plain


@pytest.mark.parametrize("mode", ["ngram", "self-draft"])
def test_fixed_draft_length_changes_nothing(fp32: Bundle, plain: list[tuple[int, ...]], mode: str) -> None:
    """Long drafts, paying or not, so that every pass has many rows."""
    fast = answers(fp32, mode, draft_length=7)
    assert [tuple(g.tokens) for g in fast] == plain
    assert sum(g.stats.verified for g in fast) > 100


def test_a_batch_of_four_changes_nothing(fp32: Bundle) -> None:
    plain, fast = (
        fp32.generate(PROMPTS, chat=True, max_new_tokens=48, speculate=mode, batch_size=4) for mode in ("off", "ngram")
    )
    assert [g.tokens for g in fast] == [g.tokens for g in plain]


def test_sampled_text_is_that_of_plain_sampling(fp32: Bundle) -> None:
    options = {"temperature": 0.8, "top_p": 0.9, "seed": 3}
    assert [g.tokens for g in answers(fp32, "ngram", **options)] == [g.tokens for g in answers(fp32, "off", **options)]


def test_exact_int4_changes_nothing(int4: Bundle) -> None:
    noise = int4.manifest.precision.row_noise
    assert noise is not None and noise.max_abs_logit_diff > noise.without_single_rows
    exact = Bundle.open(int4.files.root, threads=1, exact=True)
    plain = [g.tokens for g in answers(exact, "off")]
    assert [g.tokens for g in answers(exact, "ngram")] == plain
    # Forced to verify whatever is proposed, trees included: a row of a branch occupies another cache slot, and the
    # order of its sums is enough to change tokens where activations are rounded.
    assert [g.tokens for g in answers(exact, "ngram+self-draft", draft_length=4)] == plain


@pytest.mark.parametrize("options", [{}, {"draft_length": 5}, {"temperature": 0.8, "seed": 3}])
def test_w8a8_is_exact_without_being_asked(w8a8: Bundle, options: dict[str, Any]) -> None:
    """Sums of integers do not depend on the number of rows."""
    assert w8a8.exact
    fixed = {name: value for name, value in options.items() if name != "draft_length"}
    plain = [g.tokens for g in answers(w8a8, "off", **fixed)]
    fast = answers(w8a8, "ngram+dspark", **options)
    assert [g.tokens for g in fast] == plain
    assert sum(g.stats.accepted for g in fast) > 20


def test_w8a8_is_near_the_model(w8a8: Bundle, fp32: Bundle) -> None:
    """The most likely token of text that the model wrote itself, in a third of the memory."""
    same = []
    for prompt, text in zip(PROMPTS, answers(fp32, "off"), strict=True):
        ids = [*fp32.codec.tokenizer.encode(prompt).ids, *text.tokens]
        mine, theirs = (row_logits(b.target, ids, len(ids) - len(text.tokens), 48) for b in (w8a8, fp32))
        same += list(mine.argmax(1) == theirs.argmax(1))
    assert np.mean(same) > 0.8
    assert w8a8.manifest.files["onnx/weights.data"].size < 0.4 * fp32.manifest.files["onnx/weights.data"].size


def test_repeated_text_is_drafted_well(fp32: Bundle) -> None:
    """A drafter can be broken while the text stays right: what repeats must be accepted many tokens at a time."""
    repeat = fp32.generate(PROMPTS[2], chat=True, max_new_tokens=48, speculate="ngram", draft_length=7)
    assert repeat.stats.accepted_length > 2.0


def test_the_self_draft_agrees_with_the_target_as_measured(fp32: Bundle) -> None:
    entry = next(d for d in fp32.manifest.drafters if d.kind == "self_draft")
    assert entry.agreement is not None and entry.agreement > 0.4
    texts = answers(fp32, "self-draft", draft_length=1)
    accepted, verified = (sum(getattr(g.stats, name) for g in texts) for name in ("accepted", "verified"))
    assert accepted / verified == pytest.approx(entry.agreement, abs=0.25)


def test_bundle_files_are_standard_and_share_their_weights(fp32: Bundle) -> None:
    graphs = fp32.manifest.graphs
    assert {data for g in graphs for data in g.data_files} == {"onnx/weights.data"}
    size = fp32.manifest.files["onnx/weights.data"].size
    assert 0.53e9 < size < 0.56e9, "the weights of all graphs together are one copy of the model"
