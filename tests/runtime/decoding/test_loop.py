"""Losslessness: no drafter, batch, chunk or schedule changes the text."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dspark_export.bundle.weights import save_graphs
from dspark_export.drafts.graphs.draft_model import export_draft_model
from dspark_export.tracing.geometry import probe
from dspark_runtime.backends.ort_graph import OrtGraphEngine
from dspark_runtime.backends.protocol import EngineOptions
from dspark_runtime.decoding.loop import LoopOptions
from dspark_runtime.decoding.observer import Observer
from dspark_runtime.decoding.round import Flight
from dspark_runtime.decoding.sequence import Generation
from dspark_runtime.drafters.base import Draft, Drafter, DraftRequest
from dspark_runtime.drafters.draft_model import DraftModelDrafter
from dspark_runtime.drafters.ngram import NgramDrafter
from dspark_runtime.drafters.self_draft import SelfDrafter
from dspark_runtime.speculation.sampling import SamplingParams, UniformStream, inverse_cdf
from dspark_runtime.speculation.tree import TokenTree
from tests import tiny_models
from tests.runtime.conftest import Tiny

PROMPTS = [[5, 6, 7, 8, 9] * 3, [10, 11], [200, 100, 50, 20, 10, 5, 7], [33] * 9, list(range(40, 75))]
SAMPLED = SamplingParams(0.9, top_k=40, top_p=0.95)


class Oracle(Drafter):
    """Proposes the true continuation, as far as it is known."""

    name = "oracle"

    def __init__(self, texts: Sequence[Sequence[int]]) -> None:
        self._texts = [list(text) for text in texts]

    def draft(self, request: DraftRequest) -> Sequence[int]:
        for text in self._texts:
            if text[: len(request.tokens)] == request.tokens:
                return text[len(request.tokens) :]
        return []


class WildTrees(Drafter):
    """Proposes random trees with the true token somewhere in them, or not."""

    name = "wild"

    def __init__(self, texts: Sequence[Sequence[int]], seed: int = 0) -> None:
        self._oracle = Oracle(texts)
        self._random = random.Random(seed)

    def draft(self, request: DraftRequest) -> Draft | None:
        truth = list(self._oracle.draft(request))
        paths = [[self._random.randrange(384) for _ in range(3)] for _ in range(self._random.randrange(4))]
        paths.append(truth[: self._random.randrange(5)] + [self._random.randrange(384) for _ in range(2)])
        self._random.shuffle(paths)
        tree = TokenTree.from_paths(request.tokens[-1], paths)
        return Draft(tree.subtree(range(min(len(tree), request.limit + 1))))


class Outside(Drafter):
    """Proposes the true token beside ids that the target does not have."""

    name = "outside"

    def __init__(self, texts: Sequence[Sequence[int]]) -> None:
        self._oracle = Oracle(texts)

    def draft(self, request: DraftRequest) -> Draft:
        truth = list(self._oracle.draft(request))[:2]
        paths = [[10**9, 3], truth, [*truth[:1], 384, 3]]
        return Draft(TokenTree.from_paths(request.tokens[-1], paths), ["a", "b", "c", "d", "e", "f"][: 4 + len(truth)])


class Sampled(Drafter):
    """Draws a chain at random from its own distribution, and says so."""

    name = "sampled"

    def draft(self, request: DraftRequest) -> Draft:
        count = min(3, request.limit)
        numbers = UniformStream(1, 2, 3)
        probs = np.random.default_rng(len(request.tokens)).dirichlet(np.ones(384), count).astype(np.float32)
        tokens = [inverse_cdf(row, numbers.at(len(request.tokens) + i)) for i, row in enumerate(probs)]
        return Draft(TokenTree.chain(request.tokens[-1], tokens), probs=probs)


def full_texts(plain: Sequence[Generation], prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    return [[*prompt, *generation.tokens] for prompt, generation in zip(prompts, plain, strict=True)]


def modes(tiny: Tiny, texts: Sequence[Sequence[int]]) -> dict[str, Callable[[], list[Drafter]]]:
    return {
        "ngram": lambda: [NgramDrafter()],
        "self-draft": lambda: [SelfDrafter(tiny.self_few, pass_ms=1.0)],
        "self-draft tree": lambda: [SelfDrafter(tiny.self_few, pass_ms=1.0, branch=True)],
        "merged": lambda: [NgramDrafter(), SelfDrafter(tiny.self_few, pass_ms=1.0)],
        "oracle": lambda: [Oracle(texts)],
        "wild": lambda: [WildTrees(texts)],
    }


@pytest.mark.parametrize("params", [SamplingParams(), SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("model", ["tiny", "tiny_windowed"])
def test_every_mode_gives_the_plain_text(request: pytest.FixtureRequest, model: str, params: SamplingParams) -> None:
    tiny: Tiny = request.getfixturevalue(model)
    plain = tiny.generate(PROMPTS, params=params, tokens=24, seed=3)
    alone = [tiny.generate([prompt], params=params, tokens=24, seed=3)[0] for prompt in PROMPTS]
    assert [g.tokens for g in alone] == [g.tokens for g in plain]
    texts = full_texts(plain, PROMPTS)
    for (name, drafters), fixed in itertools.product(modes(tiny, texts).items(), (1, 5, None)):
        together = tiny.generate(PROMPTS, drafters(), params=params, tokens=24, seed=3, fixed=fixed)
        assert [g.tokens for g in together] == [g.tokens for g in plain], (name, fixed, "batch")
        for prompt, expected in list(zip(PROMPTS, plain, strict=True))[:2]:
            got = tiny.generate([prompt], drafters(), params=params, tokens=24, seed=3, fixed=fixed)[0]
            assert (got.tokens, got.text) == (expected.tokens, expected.text), (name, fixed, "alone")


def test_different_lengths_and_ends_in_one_batch(tiny: Tiny) -> None:
    plain = tiny.generate(PROMPTS, tokens=30)
    # Every sequence gets an EOS of its own among the tokens it would emit, so that they finish at different times.
    ends = [generation.tokens[4 + 5 * i] for i, generation in enumerate(plain)]
    expected = tiny.generate(PROMPTS, tokens=30, eos=ends)
    assert len({len(g.tokens) for g in expected}) > 2
    for drafters in modes(tiny, full_texts(plain, PROMPTS)).values():
        got = tiny.generate(PROMPTS, drafters(), tokens=30, eos=ends)
        assert [(g.tokens, g.finish_reason) for g in got] == [(g.tokens, g.finish_reason) for g in expected]


def test_self_draft_with_all_layers_accepts_everything(tiny: Tiny) -> None:
    for prompts in (PROMPTS[:1], PROMPTS):
        for generation in tiny.generate(prompts, [SelfDrafter(tiny.self_all, pass_ms=1.0)], tokens=41, fixed=4):
            assert generation.stats.accepted == generation.stats.verified > 0
            assert generation.stats.accepted_length == 5.0


def test_the_true_continuation_is_accepted(tiny: Tiny) -> None:
    plain = tiny.generate(PROMPTS, tokens=41)
    texts = full_texts(plain, PROMPTS)
    for generation in tiny.generate(PROMPTS, [Oracle(texts)], tokens=41, fixed=7):
        assert generation.stats.accepted == generation.stats.verified
        assert generation.stats.rounds == 5
        assert generation.stats.per_drafter["oracle"].accepted == 35


def test_a_randomly_drawn_chain_is_seeded_and_stays_in_the_vocabulary(tiny: Tiny) -> None:
    first = tiny.tokens(PROMPTS, [Sampled()], params=SamplingParams(1.5), seed=4)
    assert first == tiny.tokens(PROMPTS, [Sampled()], params=SamplingParams(1.5), seed=4)
    assert first != tiny.tokens(PROMPTS, [Sampled()], params=SamplingParams(1.5), seed=5)
    assert tiny.tokens(PROMPTS, [Sampled()]) == tiny.tokens(PROMPTS)  # greedy: drawn drafts change nothing


def test_sampling_does_not_depend_on_the_batch(tiny: Tiny) -> None:
    together = tiny.tokens(PROMPTS, params=SAMPLED, seed=9)
    backwards = tiny.tokens(PROMPTS[::-1], params=SAMPLED, seed=9)[::-1]
    assert together == backwards
    twice = tiny.tokens([PROMPTS[0], PROMPTS[0]], params=SAMPLED, seed=9)
    assert twice[0] == together[0] != twice[1]


@pytest.mark.parametrize("count", [1, 2, 3, 17])
def test_max_new_tokens_is_exact(tiny: Tiny, count: int) -> None:
    plain = tiny.generate(PROMPTS, tokens=24)
    for drafters in modes(tiny, full_texts(plain, PROMPTS)).values():
        for got, expected in zip(tiny.generate(PROMPTS, drafters(), tokens=count, fixed=6), plain, strict=True):
            assert got.tokens == expected.tokens[:count]
            assert got.finish_reason == "length"


def test_stop_strings_and_eos_inside_an_accepted_block(tiny: Tiny) -> None:
    plain = tiny.generate(PROMPTS[:1], tokens=40)[0]
    oracle = [Oracle(full_texts([plain], PROMPTS[:1]))]
    for place in range(1, 30):
        expected = tiny.generate(PROMPTS[:1], tokens=40, eos=[plain.tokens[place]])[0]
        got = tiny.generate(PROMPTS[:1], oracle, tokens=40, eos=[plain.tokens[place]], fixed=15)[0]
        assert (got.tokens, got.text, got.finish_reason) == (expected.tokens, expected.text, "eos")
    for start, size in itertools.product(range(2, 30, 3), (1, 3)):
        stop = plain.text[start : start + size]
        if not stop or "�" in stop:
            continue
        expected = tiny.generate(PROMPTS[:1], tokens=40, stop=[stop])[0]
        got = tiny.generate(PROMPTS[:1], oracle, tokens=40, stop=[stop], fixed=15)[0]
        assert (got.tokens, got.text, got.finish_reason) == (expected.tokens, expected.text, "stop")
        assert stop not in got.text
        assert plain.text.startswith(got.text)


def test_chunks_add_up_to_the_text(tiny: Tiny) -> None:
    stream = tiny.stream(PROMPTS, [NgramDrafter()], tokens=60, stop=["\n\n\n"])
    texts: dict[int, str] = dict.fromkeys(range(len(PROMPTS)), "")
    tokens: dict[int, list[int]] = {i: [] for i in range(len(PROMPTS))}
    reasons: dict[int, Any] = {}
    for chunk in stream:
        assert chunk.index not in reasons
        texts[chunk.index] += chunk.text
        tokens[chunk.index] += chunk.tokens
        if chunk.finish_reason:
            reasons[chunk.index] = chunk.finish_reason
    for i, generation in enumerate(stream.generations):
        assert (generation.text, generation.tokens) == (texts[i], tokens[i])
        assert generation.finish_reason == reasons[i]


def test_cancel_and_restart_leave_no_residue(tiny: Tiny) -> None:
    expected = tiny.tokens(PROMPTS, tokens=40)
    drafters = [NgramDrafter(), SelfDrafter(tiny.self_few, pass_ms=1.0)]
    for rounds in (0, 1, 5, 9):
        stream = tiny.stream(PROMPTS, drafters, tokens=40)
        for done, _ in enumerate(stream):
            if done == rounds:
                stream.cancel()
        for generation, full in zip(stream.generations, expected, strict=True):
            assert generation.finish_reason == "cancelled"
            assert generation.tokens == full[: len(generation.tokens)]
        abandoned = iter(tiny.stream(PROMPTS, drafters, tokens=40))
        next(abandoned)
        abandoned.close()  # type: ignore[attr-defined]
        assert tiny.tokens(PROMPTS, drafters, tokens=40) == expected


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 34, 35, 36])
def test_prefill_may_be_split_anywhere(tiny: Tiny, chunk: int) -> None:
    expected = tiny.tokens(PROMPTS, tokens=12)
    assert tiny.tokens(PROMPTS, tokens=12, options=LoopOptions(prefill_chunk=chunk)) == expected
    assert tiny.tokens(PROMPTS, tokens=12, options=LoopOptions(prefill_chunk=chunk, min_rows=2)) == expected


def test_up_to_the_last_position(tiny: Tiny) -> None:
    prompt = [i % 300 for i in range(tiny.positions - 20)]
    expected = tiny.tokens([prompt], tokens=20)
    for drafters in ([NgramDrafter()], [SelfDrafter(tiny.self_few, pass_ms=1.0)]):
        assert tiny.tokens([prompt], drafters, tokens=20, fixed=31) == expected


def test_the_cache_grows_while_generating(tiny: Tiny) -> None:
    prompts = [[7, 8, 9], PROMPTS[4]]
    capacities: list[int] = []

    class Growing(Observer):
        def started(self, flight: Flight) -> None:
            capacities.append(flight.buffers.attention_mask.shape[-1])

    drafters = [SelfDrafter(tiny.self_few, pass_ms=1.0)]
    few = LoopOptions(first_slots=1)
    loop = tiny.loop(2, 300, drafters, options=few)
    assert loop.cache.memory.capacity == 64
    found = tiny.generate(prompts, drafters, tokens=200, options=few, observer=Growing())
    assert max(capacities) > 64
    assert [g.tokens for g in found] == tiny.tokens(prompts, tokens=200)


def test_statistics_are_consistent(tiny: Tiny) -> None:
    plain = tiny.generate(PROMPTS, tokens=40)
    for drafters in modes(tiny, full_texts(plain, PROMPTS)).values():
        for generation in tiny.generate(PROMPTS, drafters(), tokens=40):
            stats = generation.stats
            assert stats.emitted == len(generation.tokens) == 40
            assert stats.emitted - 1 == stats.rounds + stats.accepted
            assert stats.accepted <= stats.verified <= stats.drafted
            assert max((c.accepted for c in stats.per_drafter.values()), default=0) <= stats.accepted
            assert stats.seconds.verify > 0
            assert stats.tokens_per_second > 0


def test_drafts_outside_the_vocabulary_cost_nothing_but_their_rows(tiny: Tiny) -> None:
    plain = tiny.tokens(PROMPTS)
    texts = [prompt + text for prompt, text in zip(PROMPTS, plain, strict=True)]
    found = tiny.generate(PROMPTS, [Outside(texts)])
    assert [generation.tokens for generation in found] == plain
    assert all(generation.stats.accepted > 10 for generation in found)


def test_a_draft_model_sits_out_for_a_text_it_cannot_read(tmp_path: Path, tiny: Tiny) -> None:
    """Its vocabulary ends at 300: prompts and texts of the target have ids after that."""
    _, model = tiny_models.make("llama", vocab_size=300, num_hidden_layers=1)
    save_graphs({"draft": export_draft_model(model, name="draft")}, tmp_path)
    cache, options = probe(model.config), EngineOptions(threads=1)
    engine = OrtGraphEngine(tmp_path / "draft.onnx", name="draft", cache=cache, options=options)
    prompts = [[5, 6, 7, 8, 9] * 3, [10, 350, 12], [299, 300], list(range(40, 75))]
    for params in (None, SAMPLED):
        plain = tiny.tokens(prompts, params=params)
        assert any(token >= 300 for token in plain[0] + plain[3])
        drafter = DraftModelDrafter("draft", engine, vocab_size=384, positions=512, readable=300)
        found = tiny.generate(prompts, [drafter], params=params)
        assert [generation.tokens for generation in found] == plain
        assert [generation.stats.drafted > 0 for generation in found] == [True, False, False, True]


def test_invalid_bytes_cost_no_text_of_a_batch(tiny: Tiny) -> None:
    """A tokenizer with byte fallback: at a temperature, some sequences have bytes that are not characters."""
    tokenizer = tiny_models.byte_fallback_tokenizer().backend_tokenizer
    bytewise = dataclasses.replace(tiny, tokenizer=tokenizer)
    found = bytewise.generate([*PROMPTS, [100, 200]], [NgramDrafter()], params=SamplingParams(1.0), tokens=60)
    assert all(len(generation.tokens) == 60 for generation in found)
    texts = [tokenizer.decode(generation.tokens) for generation in found]
    assert [generation.text.lstrip(" ") for generation in found] == [text.lstrip(" ") for text in texts]
    assert any("\ufffd" in text for text in texts)
