"""The drafter in training computes what the drafter in a bundle computes."""

from __future__ import annotations

import math

import pytest
import torch

from dspark_export.train.evaluate import likely_texts
from dspark_export.train.losses import Slots, terms
from dspark_export.train.module import DraftGeometry, TrainableDrafter
from tests.references.block_reference import CANDIDATES, draft
from tests.references.draft_samples import HEADS, HIDDEN, INNER, KV_HEADS, RANK, TAPS, VOCAB, WIDTH, random_block

LAYERS, BLOCK = 2, 4


def geometry(markov: str, confidence: bool = True) -> DraftGeometry:
    return DraftGeometry(
        hidden=HIDDEN,
        intermediate=INNER,
        heads=HEADS,
        kv_heads=KV_HEADS,
        head_dim=WIDTH,
        vocab=VOCAB,
        layers=LAYERS,
        block=BLOCK,
        taps=tuple(range(TAPS)),
        mask_token=VOCAB - 1,
        markov=markov,
        rank=RANK,
        confidence=confidence,
        theta=10000.0,
        rope={"rope_type": "default", "rope_theta": 10000.0},
        positions=512,
        epsilon=1e-6,
    )


def drafter(markov: str, draft_ids: torch.Tensor | None = None) -> TrainableDrafter:
    """With the weights of the random draft of the same kind of head."""
    torch.manual_seed(1)
    embedding, head = torch.randn(VOCAB, HIDDEN), torch.randn(VOCAB, HIDDEN)
    model = TrainableDrafter(geometry(markov), embedding, head, draft_ids)
    weights = random_block(markov, layers=LAYERS, block=BLOCK)[0].tensors
    names = dict(model.named_parameters())
    assert set(names) == set(weights)
    with torch.no_grad():
        for name, parameter in names.items():
            parameter.copy_(weights[name])
    return model


@pytest.mark.parametrize("markov", ["none", "vanilla", "gated", "rnn"])
def test_every_block_is_what_the_reference_drafts(markov: str) -> None:
    """Blocks of two sequences of different lengths in one pass; the reference has one round at a time."""
    model = drafter(markov)
    weights, shape = random_block(markov, layers=LAYERS, block=BLOCK)
    features = torch.randn(2, 11, TAPS * HIDDEN)
    features[1, 7:] = 1e3  # padding: no block may see it
    ids = torch.randint(0, VOCAB - 1, (2, 11))
    anchors = torch.tensor([[1, 4, 10], [2, 5, 7]])
    hidden = model(features, ids, anchors)
    tokens, confidences = model.draft(hidden, ids.gather(1, anchors))
    # the tokens a bundle drafts never include the mask, so the reference may not draft it either
    allowed = torch.arange(VOCAB - 1)
    for row in range(2):
        for place, anchor in enumerate(anchors[row].tolist()):
            expected = draft(
                shape,
                weights.tensors,
                model.embedding,
                model.head,
                features[row, :anchor],
                int(ids[row, anchor]),
                target_ids=allowed,
            )
            torch.testing.assert_close(hidden[row, place], expected["block_hidden"], atol=2e-5, rtol=1e-4)
            assert tokens[row, place].tolist() == expected["draft_tokens"].tolist()
            nodes = likely_texts(model, hidden[row, place, None], ids[row, anchor, None], CANDIDATES)
            assert nodes.tokens[0].tolist() == expected["beam_tokens"].tolist()
            assert nodes.parents[0].tolist() == expected["beam_parents"].tolist()
            torch.testing.assert_close(nodes.probs[0], expected["beam_probs"], atol=2e-5, rtol=1e-4)
            logits = expected["confidence_logits"]
            torch.testing.assert_close(confidences[row, place], logits, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("markov", ["vanilla", "gated", "rnn"])
def test_all_slots_at_once_are_the_slots_one_by_one(markov: str) -> None:
    model = drafter(markov)
    assert model.markov_head is not None
    hidden = torch.randn(3, BLOCK, HIDDEN)
    previous = torch.randint(0, VOCAB, (3, BLOCK))
    rows, embedded = model.markov_head.rows(hidden, previous)
    state = torch.zeros(3, RANK)
    for slot in range(BLOCK):
        state, row = model.markov_head.one(state, hidden[:, slot], embedded[:, slot])
        torch.testing.assert_close(rows[:, slot], row)


def slots(batch: int, top: int, seed: int = 0) -> Slots:
    random = torch.Generator().manual_seed(seed)
    size = (batch, 3, BLOCK)
    probs = torch.rand(*size, top, generator=random)
    ids = torch.rand(*size, VOCAB - 1, generator=random).topk(top, -1).indices
    return Slots(
        torch.randint(0, VOCAB - 1, size, generator=random),
        torch.randint(0, VOCAB - 1, size, generator=random),
        torch.rand(size, generator=random).clamp_min(0.1),
        ids,
        probs / probs.sum(-1, keepdim=True),
    )


def test_terms_are_those_of_whole_distributions() -> None:
    """With all tokens of the target kept, the distance is the full L1, and agreement one minus half of it."""
    model = drafter("vanilla")
    assert model.markov_head is not None
    hidden = torch.randn(2, 3, BLOCK, HIDDEN)
    given = slots(2, VOCAB - 1)
    found = terms(model, hidden, given, 1000)
    correction, embedded = model.markov_head.rows(hidden, given.previous)
    logits = model.logits(hidden, correction)
    target = torch.zeros(2, 3, BLOCK, VOCAB).scatter(-1, given.top_ids, given.top_probs)[..., : VOCAB - 1]
    distance = (logits.softmax(-1) - target).abs().sum(-1)
    ce = -logits.log_softmax(-1).gather(-1, given.labels[..., None])[..., 0]
    agreement = 1 - distance / 2
    bce = torch.nn.functional.binary_cross_entropy_with_logits(
        model.confidence(hidden, embedded), agreement.clamp(0, 1), reduction="none"
    )
    for name, expected in {"ce": ce, "distance": distance, "agreement": agreement, "confidence": bce}.items():
        torch.testing.assert_close(getattr(found, name), (given.weights * expected).sum(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.weight, given.weights.sum())


def test_what_is_not_kept_counts_as_not_shared() -> None:
    """The distance with few of the target's tokens is never below the true one."""
    model = drafter("vanilla")
    hidden = torch.randn(2, 3, BLOCK, HIDDEN)
    whole = slots(2, VOCAB - 1)
    few = whole.top_probs.topk(5, -1)
    cut = Slots(whole.labels, whole.previous, whole.weights, whole.top_ids.gather(-1, few.indices), few.values)
    assert terms(model, hidden, cut, 1000).distance >= terms(model, hidden, whole, 1000).distance


def test_chunks_change_neither_terms_nor_gradients() -> None:
    model = drafter("rnn")
    hidden = torch.randn(2, 3, BLOCK, HIDDEN)
    grads = []
    for chunk in (5, 1000):
        model.zero_grad()
        found = terms(model, hidden, slots(2, 9), chunk)
        (found.ce + found.distance + found.confidence).backward()  # type: ignore[no-untyped-call]
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert set(grads[0]) == set(grads[1]) and grads[0]
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-4, atol=1e-5)


def test_tokens_outside_the_draft_vocabulary_are_never_drafted() -> None:
    allowed = torch.arange(0, VOCAB - 1, 3)
    model = drafter("vanilla", allowed)
    hidden = model(torch.randn(1, 9, TAPS * HIDDEN), torch.randint(0, VOCAB, (1, 9)), torch.tensor([[2, 5]]))
    tokens, _ = model.draft(hidden, torch.tensor([[3, 4]]))
    assert set(tokens.flatten().tolist()) <= set(allowed.tolist())


def test_an_untrained_drafter_is_not_sure_of_anything() -> None:
    """Whatever the size of the target's head, cross-entropy begins near that of a guess."""
    for size in (0.05, 1.0, 20.0):
        torch.manual_seed(0)
        embedding, head = torch.randn(VOCAB, HIDDEN), torch.randn(VOCAB, HIDDEN) * size
        model = TrainableDrafter(geometry("vanilla"), embedding, head)
        ids = torch.randint(0, VOCAB - 1, (2, 9))
        hidden = model(torch.randn(2, 9, TAPS * HIDDEN), ids, torch.tensor([[2, 5], [3, 7]]))
        log_probs = torch.log_softmax(model.logits(hidden, None), -1)
        assert float(-log_probs.mean()) < math.log(VOCAB) + 3
        assert float(log_probs.max(-1).values.exp().mean()) < 0.5
