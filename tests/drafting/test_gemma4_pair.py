"""A Gemma 4 target and its DSpark draft: heads of two widths, a scaled embedding, partial rotation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from dspark_export.build.options import BuildOptions
from dspark_export.build.pipeline import build
from dspark_export.drafts.trace import trace_draft
from dspark_runtime import Bundle
from tests.drafts.writers import target_tables, write_deepspec, write_target
from tests.references.block_reference import Shape, draft

PROMPT = list(range(30, 60))
ROPE = {
    "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 10000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}


def test_its_first_round_is_that_of_the_reference_and_its_text_the_targets(tmp_path: Path) -> None:
    kinds = ["sliding_attention", "full_attention"] * 4
    target = write_target(
        tmp_path / "target", arch="gemma4_text", num_hidden_layers=8, layer_types=kinds, rope_parameters=ROPE
    )
    embedding, head = target_tables(target)
    written = write_deepspec(tmp_path / "draft", family="gemma4", tables=(embedding, head))
    out = tmp_path / "b.dspark"
    build(BuildOptions(model=str(target), out=out, drafts=(str(written.folder),), self_draft="none"))
    bundle = Bundle.open(out, threads=1)
    facts = bundle.manifest.drafters[-1].block
    assert facts is not None
    found = trace_draft(bundle, PROMPT, "dspark")
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    with torch.no_grad():
        states = model(torch.tensor([PROMPT]), output_hidden_states=True).hidden_states
    features = torch.cat([states[tap + 1][0] for tap in facts.taps], -1)
    np.testing.assert_allclose(found["target_features"], features.numpy(), rtol=0, atol=2e-4)
    shape = Shape(
        2, 4, 2, 16, facts.block, 0, facts.mask_token_id,
        gemma=True, softcap=30.0, markov="vanilla", confidence_with_markov=True, turned_pairs=2,
    )  # fmt: skip
    scaled = embedding * embedding.shape[1] ** 0.5
    expected = draft(shape, written.tensors, scaled, head, features, int(found["first_token"]))
    for name in ("ctx_features", "block_hidden", "base_logits", "corrected_logits", "confidence_logits"):
        np.testing.assert_allclose(found[name], expected[name].numpy(), rtol=0, atol=1e-4, err_msg=name)
    assert found["draft_tokens"].tolist() == expected["draft_tokens"].tolist()
    plain = bundle.generate(PROMPT, max_new_tokens=20, speculate="off", ignore_eos=True).tokens
    drafted = bundle.generate(PROMPT, max_new_tokens=20, speculate="dspark", draft_length=4, ignore_eos=True)
    assert drafted.tokens == plain and drafted.stats.per_drafter["dspark"].drafted > 20
