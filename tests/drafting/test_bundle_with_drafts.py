"""Bundles with trained drafters: the text stays the target's, seeds keep theirs, features arrive where they should."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from dspark_export.cli.main import app
from dspark_export.drafts.trace import trace_draft
from dspark_runtime import Bundle, Generation
from dspark_runtime.drafters.parts import DraftOptions
from dspark_runtime.errors import UsageError
from dspark_runtime.speculation.sampling import SamplingParams
from tests.drafting.conftest import Pairs
from tests.references.block_reference import Shape, draft

KINDS = ("dspark", "eagle3", "dflash", "eagle3-2", "draft-model")
SHORT, LONG = [5, 6, 7, 8], [*range(9, 16), *range(30, 60), 7]
# The long prompt is above the number of rows from which a sequence of a batch catches up alone.


def tokens(found: Generation | Sequence[Generation]) -> list[list[int]]:
    return [g.tokens for g in (found if isinstance(found, list) else [found])]  # type: ignore[list-item]


def generate(bundle: Bundle, prompt: Any, mode: str, **options: Any) -> Any:
    return bundle.generate(prompt, max_new_tokens=24, speculate=mode, ignore_eos=True, **options)


def test_the_bundle_knows_its_drafters(pairs: Pairs) -> None:
    assert [d.name for d in pairs.bundle.manifest.drafters] == ["ngram", "store", *KINDS]
    assert pairs.bundle.manifest.drafters[2].block is not None
    target = pairs.bundle.files.graph("target")
    assert target.taps == (1, 2, 3, 4, 5)
    assert set(pairs.bundle.speculation_modes()) >= {*KINDS, "store", "store+dspark"}
    with pytest.raises(UsageError, match="dspark"):
        pairs.bundle.generate(SHORT, speculate="dpsark")


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("kind", KINDS)
def test_the_text_is_the_targets(pairs: Pairs, kind: str, temperature: float) -> None:
    """Alone and in a ragged batch, chains and trees; every draft is verified, paying or not."""
    for prompt in (SHORT, LONG, [SHORT, LONG, [9, 9, 4]]):
        plain = tokens(generate(pairs.bundle, prompt, "off", temperature=temperature))
        for branches in (1, 3):
            found = generate(
                pairs.bundle, prompt, kind, temperature=temperature, draft_length=4, draft_branches=branches
            )
            assert tokens(found) == plain
            last = found[-1] if isinstance(found, list) else found
            assert last.stats.per_drafter[kind].drafted > 4, "nothing was drafted"
        assert tokens(generate(pairs.bundle, prompt, f"ngram+{kind}", temperature=temperature)) == plain


def test_a_target_that_drafts_for_itself_is_always_right(pairs: Pairs) -> None:
    for sampling in ("coupled", "rejection"):
        for temperature in (0.0, 0.7):
            found = generate(
                pairs.bundle, LONG, "draft-model", temperature=temperature, draft_length=4, draft_sampling=sampling
            )
            counts = found.stats.per_drafter["draft-model"]
            assert counts.accepted == counts.drafted > 10, (sampling, temperature)


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_keeps_its_text_under_rejection_sampling(pairs: Pairs, kind: str) -> None:
    """Whatever it is batched with: rounds do not depend on time, random numbers not on the batch."""
    options = {"temperature": 0.8, "draft_sampling": "rejection", "seed": 4}
    alone = [generate(pairs.bundle, prompt, kind, **options).tokens for prompt in (SHORT, LONG)]
    assert tokens(generate(pairs.bundle, [LONG, SHORT], kind, **options)) == alone[::-1]
    assert tokens(generate(pairs.bundle, [SHORT, LONG], kind, batch_size=1, **options)) == alone
    assert generate(pairs.bundle, SHORT, kind, **{**options, "seed": 5}).tokens != alone[0]


def test_a_resumed_text_drafts_as_if_never_stopped(pairs: Pairs) -> None:
    """Features of the text so far are computed again: the draft is that of a text that ran through."""
    stream = pairs.bundle.generate(LONG, max_new_tokens=20, speculate="dspark", stream=True, ignore_eos=True)
    for count, _ in enumerate(stream):
        if count == 5:
            stream.cancel()
    begun = stream.generations[0].tokens
    resumed = trace_draft(pairs.bundle, [*LONG, *begun], "dspark")
    whole = trace_draft(pairs.bundle, LONG, "dspark", rounds=len(begun) + 2)
    anchor = int(resumed["anchor_id"])
    position = int(resumed["block_positions"][0])
    same = [
        prefix
        for prefix in ("", *(f"round{n}." for n in range(1, len(begun) + 2)))
        if f"{prefix}block_positions" in whole and int(whole[f"{prefix}block_positions"][0]) == position
    ]
    assert same and int(whole[f"{same[0]}anchor_id"]) == anchor
    assert resumed["draft_tokens"].tolist() == whole[f"{same[0]}draft_tokens"].tolist()


def test_low_confidence_cuts_before_the_pass(pairs: Pairs) -> None:
    plain = generate(pairs.bundle, LONG, "off").tokens
    verified = []
    for threshold in (0.0, 0.3, 0.6, 1.0):
        found = generate(pairs.bundle, LONG, "dspark", draft_length=4, confidence_threshold=threshold)
        assert found.tokens == plain
        verified.append(found.stats.verified)
    assert verified == sorted(verified, reverse=True) and verified[0] > verified[-1] == 0


def test_traced_rounds_are_those_of_the_reference(pairs: Pairs, tmp_path: Path) -> None:
    """The verb, with features from transformers' own forward pass: they must come from the right layers and rows."""
    (tmp_path / "ids.json").write_text(json.dumps(LONG))
    out = tmp_path / "trace.npz"
    arguments = ["draft-trace", str(pairs.bundle.files.root), "--prompt-ids", str(tmp_path / "ids.json")]
    result = CliRunner().invoke(app, [*arguments, "--out", str(out), "--rounds", "3", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["draft_tokens"] == [4]
    found = np.load(out)
    model = AutoModelForCausalLM.from_pretrained(pairs.target, dtype=torch.float32).eval()
    config = pairs.bundle.manifest.drafters[2].block
    assert config is not None
    shape = Shape(2, 4, 2, 16, config.block, 0, config.mask_token_id, markov="vanilla", confidence_with_markov=True)
    text = [*LONG, int(found["first_token"])]
    start = 0
    for prefix in ("", "round1.", "round2."):
        with torch.no_grad():
            states = model(torch.tensor([text[:-1]]), output_hidden_states=True).hidden_states
        # hidden_states[0] is the embedding, so layer t's output is entry t + 1
        features = torch.cat([states[tap + 1][0] for tap in config.taps], -1)
        expected = draft(shape, pairs.dspark.tensors, *pairs.tables, features, text[-1])
        for name in ("ctx_features", "ctx_keys.0", "ctx_values.1"):
            np.testing.assert_allclose(found[prefix + name], expected[name].numpy()[start:], rtol=0, atol=1e-4)
        for name in ("block_hidden", "base_logits", "corrected_logits", "confidence_logits"):
            np.testing.assert_allclose(found[prefix + name], expected[name].numpy(), rtol=0, atol=1e-4, err_msg=name)
        assert found[prefix + "draft_tokens"].tolist() == expected["draft_tokens"].tolist()
        start = len(text) - 1
        text += found[prefix + "emitted"].tolist()


def test_traced_rejections_give_back_the_target(pairs: Pairs) -> None:
    """A draft is emitted by acceptance or after a rejection: together that is the target's distribution."""
    options, params = DraftOptions("rejection", 0.0, 1), SamplingParams(0.8)
    found = trace_draft(pairs.bundle, LONG, "dspark", options=options, params=params, seed=3)
    drafts = found["tree_tokens"][1:]
    places = np.arange(len(drafts)), drafts
    assert len(drafts) == 4 and found["draft_probs"].shape == (4, 400)
    scaled = found["target_logits"].astype(np.float64) / 0.8
    target = np.exp(scaled - scaled.max(1, keepdims=True))
    target /= target.sum(1, keepdims=True)
    q, p = found["draft_probs"].astype(np.float64), target[:4]
    np.testing.assert_allclose(found["accept_probs"], np.minimum(1, p[places] / q[places]), rtol=1e-4)
    accepted = np.minimum(p, q)
    mixed = accepted + (1 - accepted.sum(1, keepdims=True)) * found["residuals"]
    np.testing.assert_allclose(mixed, p, atol=1e-6)
    assert np.abs(p - q).sum() > 0.1
    greedy = trace_draft(pairs.bundle, LONG, "dspark")
    assert not {"accept_probs", "residuals", "draft_probs"} & set(greedy)


def test_statistics_by_depth(pairs: Pairs) -> None:
    stats = generate(pairs.bundle, LONG, "draft-model", draft_length=4, temperature=0.8).stats.to_dict()
    figures = stats["per_drafter"]["draft-model"]
    assert figures["conditional_acceptance"] == [1.0] * 4 and figures["prefix_survival"] == [1.0] * 4
    block = generate(pairs.bundle, LONG, "dspark", draft_length=4, temperature=0.8, draft_sampling="rejection").stats
    counts = block.per_drafter["dspark"]
    assert counts.positions[0].verified >= counts.positions[1].verified
    assert counts.positions[1].reached == counts.positions[0].accepted or counts.positions[1].reached > 0
    assert counts.calibration_error is not None and 0 <= counts.calibration_error <= 1
