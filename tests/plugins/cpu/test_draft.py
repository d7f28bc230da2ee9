"""MarkovDraft and BlockDraft: against float64, equal on every set, blind to other sequences and to threads."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tests.plugins.cpu.library import DRAFT_TYPES, Kernels

Array = np.ndarray[Any, Any]

VOCAB, RANK, SLOTS, CANDIDATES, BEAMS = 2500, 12, 4, 6, 3
NAMES = ("tokens", "probs", "candidates", "candidate_probs", "beam_tokens", "beam_probs", "beam_parents", "rows")


def inputs(batch: int, markov: bool, seed: int = 0, heat: float = 0.0) -> dict[str, Array]:
    random = np.random.default_rng(seed)

    def normal(*shape: int) -> Array:
        return random.standard_normal(shape).astype(np.float32)

    outer = normal(VOCAB, RANK)
    tiles = -(-VOCAB // 16)
    packed = np.zeros((tiles * 16, RANK), np.float32)
    packed[:VOCAB] = outer
    forbidden = np.zeros(VOCAB, np.float32)
    forbidden[7] = -np.inf
    made = {
        "base_logits": normal(batch, SLOTS, VOCAB) * 2,
        "anchor_ids": random.integers(0, 3000, batch),
        "temperature": np.where(np.arange(batch) % 2 == 0, heat, 0).astype(np.float32),
        "uniforms": random.random((batch, SLOTS), np.float32),
        "forbidden": forbidden,
        "target_ids": np.arange(VOCAB) * 2,
    }
    if markov:
        made |= {"anchor_rows": normal(3000, RANK), "drafted_rows": normal(VOCAB, RANK).astype(np.float16)}
        made["weight"] = packed.reshape(tiles, 16, RANK).transpose(0, 2, 1).copy()
    return made


def reference(x: dict[str, Array], b: int) -> dict[str, Array]:
    """One sequence in float64, one token after another."""
    outer = None
    if "weight" in x:
        outer = x["weight"].transpose(0, 2, 1).reshape(-1, RANK)[:VOCAB].astype(np.float64)
    heat = float(x["temperature"][b])
    found: dict[str, list[Any]] = {name: [] for name in NAMES}

    def logits(slot: int, token: int) -> tuple[Array, Array]:
        base = x["base_logits"][b, slot].astype(np.float64) + x["forbidden"]
        if outer is None:
            return base, np.zeros(0)
        row = x["drafted_rows" if slot else "anchor_rows"][token].astype(np.float64)
        return base + outer @ row, row

    def softmax(v: Array) -> Array:
        e = np.exp(v - v.max())
        return np.asarray(e / e.sum())

    token = int(x["anchor_ids"][b])
    texts, nodes = [(token, 1.0, -1)], 0
    for slot in range(SLOTS):
        values, row = logits(slot, token)
        best = np.argsort(-values, kind="stable")[:CANDIDATES]
        found["rows"].append(row)
        found["candidates"].append(best * 2)
        found["candidate_probs"].append(softmax(values)[best])
        token = int(best[0])
        if heat:
            probs = softmax(values / heat)
            found["probs"].append(probs)
            token = int((np.cumsum(probs) > x["uniforms"][b, slot]).argmax())
        found["tokens"].append(token * 2)
        grown = []
        for last, reach, end in texts:
            values, _ = logits(slot, last)
            best, probs = np.argsort(-values, kind="stable")[:CANDIDATES], softmax(values)
            for t in best:
                grown.append((int(t), reach * probs[t], nodes))
                nodes += 1
                found["beam_tokens"].append(int(t) * 2)
                found["beam_probs"].append(probs[t])
                found["beam_parents"].append(end)
        texts = sorted(grown, key=lambda text: -text[1])[:BEAMS]
    return {name: np.array(values) for name, values in found.items()}


def run(kernels: Kernels, x: dict[str, Array], threads: int = 1, form: str = "Float32") -> dict[str, Array]:
    operator = f"MarkovDraft{form}" if "weight" in x else "BlockDraft"
    made = kernels.run(
        operator, x, len(NAMES), threads=threads, output_types=DRAFT_TYPES, candidates=CANDIDATES, beams=BEAMS
    )
    return dict(zip(NAMES, made, strict=True))


@pytest.mark.parametrize("heat", [0.0, 0.8])
@pytest.mark.parametrize("markov", [True, False])
def test_drafts(every_set: list[Kernels], markov: bool, heat: float) -> None:
    x = inputs(3, markov, heat=heat)
    results = [run(kernels, x, threads=2) for kernels in every_set]
    for kernels, result in zip(every_set, results, strict=True):
        for name in NAMES:
            assert np.array_equal(result[name], results[-1][name]), (kernels.name, name)
    found = results[0]
    for b in range(3):
        wanted = reference(x, b)
        for name in ("tokens", "candidates", "beam_tokens", "beam_parents"):
            assert np.array_equal(found[name][b], wanted[name]), name
        for name in ("candidate_probs", "beam_probs"):
            np.testing.assert_allclose(found[name][b], wanted[name], rtol=2e-5, atol=1e-9)
        if markov:
            np.testing.assert_array_equal(found["rows"][b], wanted["rows"].astype(np.float32))
        if heat and b % 2 == 0:
            np.testing.assert_allclose(found["probs"][b // 2], wanted["probs"], rtol=2e-5, atol=1e-9)
    assert len(found["probs"]) == (2 if heat else 0)


def test_a_sequence_is_blind_to_others_and_to_threads(best: Kernels) -> None:
    x = inputs(9, True, seed=3, heat=1.1)
    whole = run(best, x, threads=3)
    by_sequence = ("base_logits", "anchor_ids", "temperature", "uniforms")
    for b in range(9):
        alone = run(best, {name: a[b : b + 1] if name in by_sequence else a for name, a in x.items()})
        for name in NAMES:
            if name != "probs":
                assert np.array_equal(alone[name][0], whole[name][b]), name
        if b % 2 == 0:
            assert np.array_equal(alone["probs"][0], whole["probs"][b // 2])


def test_sixteen_bits_give_the_bits_of_float32(best: Kernels) -> None:
    x = inputs(2, True, seed=5)
    x["weight"] = x["weight"].astype(np.float16).astype(np.float32)
    x["anchor_rows"] = x["anchor_rows"].astype(np.float16).astype(np.float32)
    wanted = run(best, x)
    half = {**x, "weight": x["weight"].astype(np.float16), "anchor_rows": x["anchor_rows"].astype(np.float16)}
    found = run(best, half, form="Float16")
    assert all(np.array_equal(found[name], wanted[name]) for name in NAMES)
    x["weight"] = x["weight"].astype(ml_dtypes.bfloat16).astype(np.float32)
    wanted = run(best, x)
    tiles = x["weight"].shape[0]
    pairs = x["weight"].reshape(tiles, RANK // 2, 2, 16).transpose(0, 1, 3, 2).astype(ml_dtypes.bfloat16)
    found = run(best, {**x, "weight": pairs}, form="BFloat16")
    assert all(np.array_equal(found[name], wanted[name]) for name in NAMES)


def test_numbers_that_are_none_do_not_lead_outside(every_set: list[Kernels]) -> None:
    x = inputs(4, True, heat=1.0)
    x["base_logits"][0, 0] = np.nan
    x["base_logits"][1, 1, 5] = np.inf
    x["base_logits"][2, 2] = -np.inf
    for kernels in every_set:
        found = run(kernels, x)
        for name in ("tokens", "candidates", "beam_tokens"):
            assert ((found[name] >= 0) & (found[name] < 2 * VOCAB)).all()
        assert (found["beam_parents"] < found["beam_tokens"].shape[1]).all()


def test_what_does_not_fit_is_refused(best: Kernels) -> None:
    x = inputs(2, True)
    for name, value, reason in (
        ("anchor_ids", np.array([1, 3000]), "anchor 3000 is outside the table of 3000 rows"),
        ("anchor_ids", np.array([1, -1]), "anchor -1"),
        ("temperature", np.zeros(3, np.float32), r"temperature float32 \[3\] must be \[2\]"),
        ("uniforms", np.zeros((2, 3), np.float32), r"must be \[2, 4\]"),
        ("forbidden", np.zeros(3, np.float32), "must have 2500 values, or none"),
        ("drafted_rows", np.zeros((3, RANK), np.float32), "a row for each of 2500"),
        ("drafted_rows", np.zeros((VOCAB, 3), np.float32), "rows of one length"),
        ("anchor_rows", np.zeros((9, RANK), np.int64), "must be floats"),
        ("base_logits", np.zeros((2, SLOTS, 3), np.float32), "must have 6 draft tokens or more"),
        ("weight", x["weight"][1:], "does not fit K = 12, N = 2500"),
    ):
        with pytest.raises(Exception, match=reason):
            run(best, {**x, name: value})
    empty = run(best, {**x, "base_logits": x["base_logits"][:0], "anchor_ids": x["anchor_ids"][:0],
                       "temperature": x["temperature"][:0], "uniforms": x["uniforms"][:0]})  # fmt: skip
    assert empty["tokens"].shape == (0, SLOTS)
