"""Every format is recognised and read into the same form; what the files leave out is filled in as the format says."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dspark_export.checkpoints import Checkpoint, Trust
from dspark_export.drafts.formats import BlockConfig, DraftCheckpoint, EagleConfig, recognise
from dspark_export.drafts.formats.speculators import eagle3_taps
from dspark_export.drafts.formats.zlab import zlab_taps
from dspark_runtime.errors import (
    InvalidWeights,
    ModelNotFound,
    UnsupportedArchitecture,
    UntrustedCheckpoint,
    UsageError,
)
from tests.checkpoints.checkpoint_samples import write_checkpoint
from tests.checkpoints.test_weights import shards
from tests.drafts.conftest import Target, change
from tests.drafts.writers import (
    Sizes,
    Written,
    write_classic_eagle3,
    write_deepspec,
    write_specforge,
    write_speculators,
    write_zlab,
)

TABLES = ("embed_tokens.weight", "lm_head.weight")


def opened(folder: Path, **options: Any) -> DraftCheckpoint:
    draft = recognise(str(folder), **options)
    assert isinstance(draft, DraftCheckpoint)
    return draft


def block(draft: DraftCheckpoint) -> BlockConfig:
    assert isinstance(draft.config, BlockConfig)
    return draft.config


def eagle(draft: DraftCheckpoint) -> EagleConfig:
    assert isinstance(draft.config, EagleConfig)
    return draft.config


def same_tensors(draft: DraftCheckpoint, written: Written) -> None:
    """The draft has exactly the tensors that were written, the target's tables apart."""
    kept = {name for name in written.tensors if name not in TABLES or (name == TABLES[1] and draft.own_head)}
    assert set(draft.tensors) == kept and len(draft.tensors) == len(kept)
    assert all(torch.equal(draft.tensors[name], written.tensors[name]) for name in kept)
    assert all(torch.equal(draft.copies[name], written.tensors[name]) for name in draft.copies)


# DeepSpec


@pytest.mark.parametrize("family", ["qwen3", "gemma4"])
@pytest.mark.parametrize("markov", ["none", "vanilla", "gated", "rnn"])
def test_deepspec_dspark(tmp_path: Path, family: str, markov: str) -> None:
    written = write_deepspec(
        tmp_path / "draft", "dspark", family, markov, bias=markov == "gated", k_eq_v=markov != "rnn"
    )
    draft = opened(written.folder)
    config, layers = block(draft), draft.config.layers
    assert draft.format == f"DeepSpec DSpark ({family})" and not draft.has_tokenizer and draft.target_layers == 8
    assert (config.taps, config.block, config.drafts, config.first_slot) == ((1, 3, 5), 4, 4, 0)
    assert (config.markov, config.markov_rank) == (markov, 0 if markov == "none" else 8)
    assert config.confidence and config.confidence_with_markov == (markov != "none")
    assert (layers.count, layers.heads, layers.kv_heads, layers.head_dim, layers.windows) == (2, 4, 2, 16, (None, None))
    if family == "gemma4":
        assert (layers.scale, layers.softcap, layers.activation) == (1.0, 30.0, "gelu_pytorch_tanh")
        assert (layers.rope.partial, layers.k_eq_v) == (0.25, markov != "rnn")
    else:
        assert (layers.scale, layers.softcap, layers.activation) == (0.25, None, "silu")
    assert set(draft.copies) == set(TABLES) and not draft.own_embedding and not draft.own_head
    same_tensors(draft, written)


@pytest.mark.parametrize("family", ["qwen3", "gemma4"])
def test_deepspec_dflash_has_no_heads(tmp_path: Path, family: str) -> None:
    written = write_deepspec(tmp_path / "draft", "dflash", family)
    draft = opened(written.folder)
    assert draft.format == f"DeepSpec DFlash ({family})"
    assert (block(draft).markov, block(draft).confidence, block(draft).first_slot) == ("none", False, 0)
    same_tensors(draft, written)


@pytest.mark.parametrize("family", ["qwen3", "gemma4"])
def test_deepspec_eagle3(tmp_path: Path, family: str) -> None:
    written = write_deepspec(tmp_path / "draft", "eagle3", family)
    draft = opened(written.folder)
    config = eagle(draft)
    assert (config.taps, config.steps, config.qk_norm) == ((0, 1, 3, 5, 6), 7, True)
    assert not config.norm_before_residual and not draft.own_head and draft.target_ids is None
    same_tensors(draft, written)


def test_eagle3_may_be_called_eagle3draftmodel(tmp_path: Path) -> None:
    draft = opened(write_deepspec(tmp_path / "draft", "eagle3", architectures=["Eagle3DraftModel"]).folder)
    assert draft.format == "DeepSpec Eagle3 (qwen3)"


def test_the_embedding_may_be_tapped(tmp_path: Path) -> None:
    sizes = Sizes(taps=(-1, 0, 6))
    assert opened(write_deepspec(tmp_path / "draft", sizes=sizes).folder).config.taps == (-1, 0, 6)


def test_a_config_that_transformers_saved(tmp_path: Path) -> None:
    from transformers import Qwen3Config

    written = write_deepspec(tmp_path / "draft")
    raw = json.loads((written.folder / "config.json").read_text())
    config = Qwen3Config(**{key: value for key, value in raw.items() if key != "transformers_version"})
    config._attn_implementation = "sdpa"
    config.save_pretrained(written.folder)
    assert "markov_rank" in json.loads((written.folder / "config.json").read_text())
    same_tensors(opened(written.folder), written)


def test_heads_of_gemma_as_newer_transformers_save_them(tmp_path: Path) -> None:
    by_layer = {"5": {"head_dim": 16, "num_key_value_heads": 2}}
    written = write_deepspec(tmp_path / "draft", "dspark", "gemma4", global_head_dim=..., per_layer_config=by_layer)
    layers = opened(written.folder).config.layers
    assert (layers.head_dim, layers.kv_heads) == (16, 2)


def test_the_older_way_to_write_rotary_settings(tmp_path: Path) -> None:
    folder = write_deepspec(tmp_path / "draft", rope_parameters=..., rope_theta=5e5, rope_scaling=None).folder
    assert opened(folder).config.layers.rope.theta == 5e5
    scaled = {"type": "linear", "factor": 2.0}
    folder = write_deepspec(tmp_path / "scaled", rope_parameters=..., rope_theta=5e5, rope_scaling=scaled).folder
    assert opened(folder).config.layers.rope.parameters == {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}


def test_tensors_are_read_when_asked_for(tmp_path: Path) -> None:
    written = write_deepspec(tmp_path / "draft", dtype=torch.bfloat16)
    draft = opened(written.folder)
    assert draft.tensors["fc.weight"].dtype == torch.bfloat16
    assert draft.tensors["fc.weight"] is not draft.tensors["fc.weight"]
    assert set(draft.files or {}) == {"config.json", "model.safetensors"}


def test_a_deepspec_draft_may_leave_the_tables_to_the_target(tmp_path: Path) -> None:
    written = write_deepspec(tmp_path / "draft")
    change(written.folder, lambda loaded: [loaded.pop(name) for name in TABLES])
    draft = opened(written.folder)
    assert not draft.copies and not draft.own_embedding and not draft.own_head
    same_tensors(draft, written)


def test_shards(tmp_path: Path) -> None:
    written = write_deepspec(tmp_path / "draft")
    shards(written.folder)
    draft = opened(written.folder)
    same_tensors(draft, written)
    assert len(draft.files or {}) == 3


# z-lab and SpecForge


@pytest.mark.parametrize("nested", [False, True])
def test_zlab(tmp_path: Path, nested: bool) -> None:
    written = write_zlab(tmp_path / "draft", nested_block=nested)
    draft = opened(written.folder)
    config = block(draft)
    assert draft.format == "z-lab DFlash" and not draft.copies and draft.target_layers == 8
    assert (config.block, config.first_slot, config.drafts, config.taps) == (4, 1, 3, (1, 3, 5))
    same_tensors(draft, written)


def test_zlab_taps_are_derived(tmp_path: Path) -> None:
    sizes = Sizes(layers=3, target_layers=9, taps=(1, 4, 6))
    draft = opened(write_zlab(tmp_path / "draft", sizes=sizes, taps=False).folder)
    assert draft.config.taps == zlab_taps(9, 3) == (1, 4, 6) and draft.taps_rule == "zlab"
    assert (
        zlab_taps(36, 5) == (1, 9, 17, 25, 33) and zlab_taps(36, 1) == (18,) and zlab_taps(30, 5) == (1, 8, 14, 20, 27)
    )
    unknown = opened(write_zlab(tmp_path / "unknown", sizes=sizes, taps=False, num_target_layers=...).folder)
    assert unknown.config.taps == () and unknown.target_layers is None


def test_code_beside_a_draft_does_not_run(tmp_path: Path) -> None:
    written = write_zlab(tmp_path / "draft")
    (written.folder / "dflash.py").write_text("import sys\nsys.dflash_ran = True\nclass DFlashDraftModel: pass\n")
    for trust in (Trust.closed(), Trust.opened()):
        same_tensors(opened(written.folder, trust=trust), written)
    assert not hasattr(sys, "dflash_ran")


def test_sliding_layers_of_a_dflash_config_say_whether_they_are_causal(tmp_path: Path) -> None:
    sliding: dict[str, Any] = {
        "layer_types": ["sliding_attention"] * 2,
        "sliding_window": 6,
        "use_sliding_window": True,
    }
    for causal in (True, False):
        config = block(opened(write_zlab(tmp_path / str(causal), causal=causal, **sliding).folder))
        assert config.layers.windows == (6, 6) and config.causal_windows is causal


def test_specforge(tmp_path: Path) -> None:
    written = write_specforge(tmp_path / "draft")
    draft = opened(written.folder)
    config = block(draft)
    assert draft.format == "SpecForge DSpark" and (config.first_slot, config.drafts) == (1, 3)
    assert (config.markov, config.markov_rank, config.confidence_with_markov) == ("vanilla", 8, True)
    same_tensors(draft, written)
    from_anchor = block(opened(write_specforge(tmp_path / "anchor", sample_from_anchor=True).folder))
    assert (from_anchor.first_slot, from_anchor.drafts) == (0, 4)


# speculators


@pytest.mark.parametrize(("kind", "first_slot"), [("dspark", 0), ("dflash", 1)])
@pytest.mark.parametrize("draft_vocab", [None, 96])
def test_speculators_blocks(tmp_path: Path, kind: str, first_slot: int, draft_vocab: int | None) -> None:
    written = write_speculators(tmp_path / "draft", kind, draft_vocab=draft_vocab)
    draft = opened(written.folder)
    config = block(draft)
    assert config.taps == (1, 3, 5), "ids in the file are one more"
    assert json.loads((written.folder / "config.json").read_text())["aux_hidden_state_layer_ids"] == [2, 4, 6]
    assert (config.first_slot, config.drafts) == (first_slot, 4 - first_slot)
    assert (config.draft_vocab_size, config.vocab_size) == (draft_vocab or 400, 400)
    assert config.confidence == (kind == "dspark") and not draft.own_head
    assert set(draft.copies) == ({"lm_head.weight"} if draft_vocab else set())
    assert_ids(draft, written)
    same_tensors(draft, written)


def assert_ids(draft: DraftCheckpoint, written: Written) -> None:
    if written.target_ids is None:
        assert draft.target_ids is None
    else:
        assert draft.target_ids is not None and draft.target_ids.dtype == torch.int64
        assert torch.equal(draft.target_ids, written.target_ids)


@pytest.mark.parametrize(("kind", "stated"), [("dspark", False), ("dflash", True)])
def test_sample_from_anchor_can_be_stated(tmp_path: Path, kind: str, stated: bool) -> None:
    config = block(
        opened(write_speculators(tmp_path / "draft", kind, sample_from_anchor=stated, speculators_config={}).folder)
    )
    assert config.first_slot == (0 if stated else 1)


@pytest.mark.parametrize("non_causal", [False, True])
def test_sliding_layers_of_speculators(tmp_path: Path, non_causal: bool) -> None:
    config = block(opened(write_speculators(tmp_path / "draft", window=6, non_causal=non_causal).folder))
    assert config.layers.windows == (6, None) and config.causal_windows is not non_causal


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("before", [False, True])
def test_speculators_eagle3(tmp_path: Path, qk_norm: bool, before: bool) -> None:
    written = write_speculators(
        tmp_path / "draft", "eagle3", draft_vocab=96, qk_norm=qk_norm, norm_before_residual=before
    )
    draft = opened(written.folder)
    config = eagle(draft)
    assert (config.taps, config.steps) == ((1, 3, 5), 3)
    assert (config.qk_norm, config.norm_before_residual) == (qk_norm, before)
    assert draft.own_head and not draft.copies
    assert_ids(draft, written)
    same_tensors(draft, written)


def test_an_embedding_that_was_trained_is_the_drafts_own(tmp_path: Path, target: Target) -> None:
    folder = write_speculators(
        tmp_path / "draft", "eagle3", draft_vocab=96, tables=target.tables, embed_requires_grad=True
    ).folder
    draft = opened(folder)
    assert draft.own_embedding and "embed_tokens.weight" in draft.tensors and not draft.copies


# EAGLE-3 of its authors


@pytest.mark.parametrize("fc_bias", [False, True])
def test_classic_eagle3(tmp_path: Path, fc_bias: bool) -> None:
    written = write_classic_eagle3(tmp_path / "draft", fc_bias=fc_bias)
    draft = opened(written.folder)
    config = eagle(draft)
    assert draft.format == "EAGLE-3" and draft.own_head and config.fc_bias is fc_bias
    assert (config.taps, draft.taps_rule, config.qk_norm) == ((), "eagle3", False)
    assert (config.draft_vocab_size, config.vocab_size) == (96, 400)
    assert_ids(draft, written)
    same_tensors(draft, written)
    assert eagle3_taps(32) == (1, 15, 28) and eagle3_taps(36) == (1, 17, 32)


def test_taps_a_classic_config_may_name(tmp_path: Path) -> None:
    ids = {"eagle_aux_hidden_state_layer_ids": [1, 3, 5]}
    nested = opened(write_classic_eagle3(tmp_path / "a", eagle_config={**ids, "use_aux_hidden_state": True}).folder)
    shifted = opened(write_classic_eagle3(tmp_path / "b", eagle_aux_hidden_state_layer_ids=[2, 4, 6]).folder)
    assert nested.config.taps == shifted.config.taps == (1, 3, 5)


def test_a_classic_config_is_known_by_its_reduced_vocabulary(tmp_path: Path) -> None:
    folder = write_classic_eagle3(tmp_path / "draft", architectures=["LlamaForCausalLM"], rope_theta=...).folder
    draft = opened(folder)
    assert draft.format == "EAGLE-3" and draft.config.layers.rope.theta == 10000.0


def test_a_classic_draft_may_share_the_head(tmp_path: Path) -> None:
    written = write_classic_eagle3(tmp_path / "draft")
    change(written.folder, lambda loaded: loaded.pop("lm_head.weight"))
    draft = opened(written.folder)
    assert not draft.own_head and "lm_head.weight" not in draft.tensors


def test_pickled_weights_need_the_open_gate(tmp_path: Path) -> None:
    written = write_classic_eagle3(tmp_path / "draft", pickled=True)
    with pytest.raises(UntrustedCheckpoint, match=r"pytorch_model\.bin.*--allow-unsafe-checkpoint"):
        recognise(str(written.folder))
    draft = opened(written.folder, trust=Trust.opened())
    same_tensors(draft, written)
    assert_ids(draft, written)


def test_a_pickle_of_something_else_is_refused(tmp_path: Path) -> None:
    written = write_classic_eagle3(tmp_path / "draft", pickled=True)
    file = written.folder / "pytorch_model.bin"
    torch.save([1, 2], file)
    with pytest.raises(InvalidWeights, match="holds no tensors by name"):
        recognise(str(written.folder), trust=Trust.opened())
    file.write_bytes(b"not a pickle")
    with pytest.raises(InvalidWeights, match="cannot be read"):
        recognise(str(written.folder), trust=Trust.opened())


# Others


def test_a_language_model_is_a_draft_model(tmp_path: Path) -> None:
    draft = recognise(str(write_checkpoint(tmp_path / "model")))
    assert isinstance(draft, Checkpoint) and draft.tokenizer is not None


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (
            lambda f: write_speculators(f, speculators_model_type="mlp_speculator"),
            "type 'mlp_speculator'; dspark, dflash",
        ),
        (lambda f: write_deepspec(f, architectures=["Qwen3ForCausalLM"]), "it has target_layer_ids"),
        (
            lambda f: write_deepspec(f, architectures=["DeepseekV4DSparkModel"]),
            "DeepseekV4DSparkModel.*Qwen3DSparkModel",
        ),
    ],
)
def test_other_kinds_of_drafts_are_named(tmp_path: Path, write: Callable[[Path], Written], says: str) -> None:
    write(tmp_path / "draft")
    with pytest.raises(UnsupportedArchitecture, match=says):
        recognise(str(tmp_path / "draft"))


def test_what_is_no_draft_at_all(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="no file or folder"):
        recognise(str(tmp_path / "nothing"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelNotFound, match="it is empty"):
        recognise(str(tmp_path / "empty"))
    folder = write_deepspec(tmp_path / "draft").folder
    with pytest.raises(UsageError, match="local path"):
        recognise(str(folder), revision="main")
    (folder / "config.json").write_text('{"model_type": "nonsense"}')
    with pytest.raises(UnsupportedArchitecture, match="nonsense"):
        recognise(str(folder))
