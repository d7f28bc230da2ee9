"""Every way a draft can fail to fit its model has a finding, a message and its own error; all are reported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dspark_export.checkpoints import Checkpoint, resolve
from dspark_export.drafts.formats import DraftCheckpoint, recognise
from dspark_export.drafts.pair_check import PairWarning, check_pair, embeddings, require_pair
from dspark_runtime.errors import (
    BlockSizeMismatch,
    DraftMismatch,
    EmbeddingsMismatch,
    HiddenSizeMismatch,
    MaskTokenMismatch,
    RopeMismatch,
    TapsMismatch,
    TokenizerMismatch,
)
from tests import tiny_models
from tests.drafts.conftest import Target, change
from tests.drafts.pair_reports import give_tokenizer, of, only_error, report, zlab_config
from tests.drafts.writers import (
    Sizes,
    Written,
    target_tables,
    write_classic_eagle3,
    write_deepspec,
    write_specforge,
    write_speculators,
    write_target,
    write_zlab,
)

# Pairs that fit


@pytest.mark.parametrize("kind", ["dspark", "dflash", "eagle3"])
def test_deepspec_fits(tmp_path: Path, target: Target, kind: str) -> None:
    written = write_deepspec(tmp_path / "draft", kind, tables=target.tables)
    give_tokenizer(written.folder)
    found = report(target, written)
    assert found.ok and found.error() is None
    assert not found.warnings
    names = {"tokenizer", "vocabulary", "hidden_size", "taps", "block_size", "rope", "positions"}
    assert {finding.id for finding in found.findings} == names | {"embedding", "head"} | (
        set() if kind == "eagle3" else {"mask_token"}
    )
    assert of(found, "vocabulary").found == "both have 400 rows, of which 16 are padding"
    assert of(found, "embedding").found == "all 400 rows agree"


@pytest.mark.parametrize("write", [write_zlab, write_specforge, write_classic_eagle3, write_speculators])
def test_other_formats_fit(tmp_path: Path, target: Target, write: Callable[[Path], Written]) -> None:
    written = write(tmp_path / "draft")
    give_tokenizer(written.folder)
    found = report(target, written)
    assert found.ok and not found.warnings
    assert isinstance(found.fitted, DraftCheckpoint) and found.fitted.config.taps


def test_taps_are_derived_from_the_models_depth(tmp_path: Path, target: Target) -> None:
    classic = report(target, write_classic_eagle3(tmp_path / "classic"))
    assert isinstance(classic.fitted, DraftCheckpoint) and classic.fitted.config.taps == (1, 3, 4)
    sizes = Sizes(taps=(1, 5), layers=2)
    zlab = report(target, write_zlab(tmp_path / "zlab", sizes=sizes, taps=False, num_target_layers=...))
    assert isinstance(zlab.fitted, DraftCheckpoint) and zlab.fitted.config.taps == (1, 5)
    assert of(zlab, "taps").found == "1, 5, derived from the model's depth"


def test_a_fit_changes_nothing_that_fits(tmp_path: Path, target: Target) -> None:
    written = write_deepspec(tmp_path / "draft", tables=target.tables)
    draft = recognise(str(written.folder))
    with pytest.warns(PairWarning, match="without tokenizer files"):
        fitted = require_pair(target.checkpoint, draft)
    assert isinstance(fitted, DraftCheckpoint) and isinstance(draft, DraftCheckpoint)
    assert fitted.config == draft.config and fitted.target_ids is None
    assert not fitted.own_embedding and not fitted.own_head
    assert set(fitted.tensors) == set(draft.tensors) and len(fitted.tensors) == len(draft.tensors)
    assert all(torch.equal(fitted.tensors[name], draft.tensors[name]) for name in draft.tensors)


# Geometry


def test_hidden_size(tmp_path: Path, target: Target) -> None:
    written = write_deepspec(tmp_path / "draft", sizes=Sizes(hidden=32))
    finding = only_error(report(target, written), HiddenSizeMismatch, "hidden_size")
    assert finding.found == "the model's are 64 wide, the draft takes 32"


@pytest.mark.parametrize(
    ("taps", "says"), [((1, 3, 7), "it reads layer 7, the last one"), ((1, 3, 12), "it reads 12"), ((3, 8, 9), "8, 9")]
)
def test_taps_outside_the_model(tmp_path: Path, target: Target, taps: tuple[int, ...], says: str) -> None:
    written = write_zlab(tmp_path / "draft", sizes=Sizes(taps=taps))
    finding = only_error(report(target, written), TapsMismatch, "taps")
    assert says in finding.found and "layers 0 to 6" in finding.asked


def test_ids_of_speculators_that_are_not_shifted_back_would_pass(tmp_path: Path, target: Target) -> None:
    written = write_speculators(tmp_path / "draft", sizes=Sizes(taps=(-1, 3, 6)))
    found = report(target, written)
    assert found.ok and of(found, "taps").found == "-1, 3, 6", "ids 0, 4, 7 in the file"


def test_heads_of_another_width_are_a_warning(tmp_path: Path, target: Target) -> None:
    found = report(target, write_deepspec(tmp_path / "draft", sizes=Sizes(head_dim=8), tables=target.tables))
    assert found.ok and of(found, "head_dim").found == "16 in the model, 8 in the draft"


def test_depth(tmp_path: Path, target: Target) -> None:
    written = write_zlab(tmp_path / "draft", num_target_layers=36)
    finding = only_error(report(target, written), TapsMismatch, "depth")
    assert finding.found == "it was trained for a model of 36 layers, this one has 8"


def test_taps_that_cannot_be_derived(tmp_path: Path) -> None:
    shallow = resolve(str(write_target(tmp_path / "target", Sizes(target_layers=4))))
    found = check_pair(shallow, recognise(str(write_classic_eagle3(tmp_path / "draft").folder)))
    finding = only_error(found, TapsMismatch, "taps")
    assert "its config names no layers, and the usual 0, 1 are not the 3" in finding.found


def test_a_block_shorter_than_asked(tmp_path: Path, target: Target) -> None:
    written = write_zlab(tmp_path / "draft")
    assert report(target, written, drafts=3).ok
    finding = only_error(report(target, written, drafts=4), BlockSizeMismatch, "block_size")
    assert "its blocks of 4 give 3" in finding.found and "ask for at most 3" in finding.fix
    steps = report(target, write_classic_eagle3(tmp_path / "eagle"), drafts=9)
    assert steps.ok and "trained for 7 in a row" in of(steps, "block_size").found


@pytest.mark.parametrize(
    ("mask", "says"),
    [
        (400, "mask_token_id 400 is outside its 400 rows"),
        (1, "mask_token_id 1 ends the model's texts"),
        (100, "mask_token_id 100 is the ordinary token"),
    ],
)
def test_mask_tokens(tmp_path: Path, target: Target, mask: int, says: str) -> None:
    written = write_zlab(tmp_path / "draft", dflash_config=zlab_config(mask))
    finding = only_error(report(target, written), MaskTokenMismatch, "mask_token")
    assert says in finding.found


@pytest.mark.parametrize(("mask", "says"), [(5, "the reserved token '<|system|>'"), (390, "unused")])
def test_mask_tokens_that_no_text_has(tmp_path: Path, target: Target, mask: int, says: str) -> None:
    found = report(target, write_zlab(tmp_path / "draft", dflash_config=zlab_config(mask)))
    assert found.ok and says in of(found, "mask_token").found


def test_rope(tmp_path: Path, target: Target) -> None:
    for write in (write_deepspec, write_zlab, write_speculators):
        written = write(tmp_path / write.__name__, sizes=Sizes(theta=5e5), **_tables(write, target))
        finding = only_error(report(target, written), RopeMismatch, "rope")
        assert "rope_theta is 10000.0 in the model and 500000.0 in the draft" in finding.found
    own = report(target, write_classic_eagle3(tmp_path / "classic", sizes=Sizes(theta=5e5)))
    assert own.ok and of(own, "rope").severity == "warning"
    scaled = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    written = write_deepspec(tmp_path / "scaled", rope_parameters=scaled, tables=target.tables)
    finding = only_error(report(target, written), RopeMismatch, "rope")
    assert "rope_type is default in the model and linear in the draft" in finding.found


def _tables(write: Callable[..., Written], target: Target) -> dict[str, Any]:
    return {"tables": target.tables} if write is write_deepspec else {}


def test_fewer_positions_are_a_warning(tmp_path: Path, target: Target) -> None:
    found = report(target, write_zlab(tmp_path / "draft", sizes=Sizes(positions=128)))
    assert found.ok and "end at 128, the model's at 512" in of(found, "positions").found


# Stored embeddings


@pytest.mark.parametrize("name", ["embedding", "head"])
def test_one_row_that_differs(tmp_path: Path, target: Target, name: str) -> None:
    written = write_deepspec(tmp_path / "draft", tables=target.tables)
    stored = {"embedding": "embed_tokens.weight", "head": "lm_head.weight"}[name]
    change(written.folder, lambda loaded: loaded[stored][77].mul_(1.05))
    finding = only_error(report(target, written), EmbeddingsMismatch, name)
    assert "1 of 400 compared rows differ (tokens 77)" in finding.found
    assert "--allow-own-embeddings" in finding.fix
    allowed = report(target, written, allow_own_embeddings=True)
    assert allowed.ok and of(allowed, name).severity == "warning"
    fitted = allowed.fitted
    assert isinstance(fitted, DraftCheckpoint)
    assert (fitted.own_embedding, fitted.own_head) == (name == "embedding", name == "head")
    assert torch.equal(fitted.tensors[stored], load_file(written.folder / "model.safetensors")[stored])
    assert not ({"embed_tokens.weight", "lm_head.weight"} - {stored}) & set(fitted.tensors)


def test_tables_the_draft_leaves_out_are_the_models(tmp_path: Path, target: Target) -> None:
    written = write_deepspec(tmp_path / "draft")
    change(written.folder, lambda loaded: [loaded.pop(name) for name in ("embed_tokens.weight", "lm_head.weight")])
    found = report(target, written)
    assert found.ok and of(found, "embedding").found == of(found, "head").found == "not stored, the model's"
    own = report(target, write_classic_eagle3(tmp_path / "eagle"))
    assert of(own, "head").found == "the draft's own"


def test_copies_rounded_to_bfloat16_are_copies(tmp_path: Path, target: Target) -> None:
    assert report(target, write_deepspec(tmp_path / "draft", tables=target.tables, dtype=torch.bfloat16)).ok
    assert report(target, write_deepspec(tmp_path / "half", tables=target.tables, dtype=torch.float16)).ok


def test_a_tied_target_has_its_embedding_for_a_head(tmp_path: Path) -> None:
    folder = write_target(tmp_path / "target", tie_word_embeddings=True)
    tied, (embedding, head) = resolve(str(folder)), target_tables(folder)
    assert torch.equal(embedding, head)
    assert check_pair(tied, recognise(str(write_deepspec(tmp_path / "a", tables=(embedding, head)).folder))).ok
    wrong = write_deepspec(tmp_path / "b", tables=(embedding, head + 1))
    only_error(check_pair(tied, recognise(str(wrong.folder))), EmbeddingsMismatch, "head")


def test_a_reduced_head_is_compared_row_by_row(tmp_path: Path, target: Target) -> None:
    written = write_speculators(tmp_path / "draft", draft_vocab=96, tables=target.tables)
    assert of(report(target, written), "head").found == "all 96 rows agree"
    change(written.folder, lambda loaded: loaded["lm_head.weight"][10].neg_())
    finding = only_error(report(target, written), EmbeddingsMismatch, "head")
    assert "tokens 40)" in finding.found, "the target's id of draft token 10"


def test_large_tables_are_sampled(tmp_path: Path, target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "FULL_ELEMENTS", 1000)
    monkeypatch.setattr(embeddings, "SAMPLED_ROWS", 50)
    written = write_deepspec(tmp_path / "draft", tables=target.tables)
    assert of(report(target, written), "embedding").found == "51 rows, every 8th, agree", "the mask's row is among them"
    change(written.folder, lambda loaded: loaded["embed_tokens.weight"].add_(0.01))
    assert "51 of 51 compared rows differ" in of(report(target, written), "embedding").found


def test_a_target_whose_tables_have_other_names(tmp_path: Path) -> None:
    folder = tmp_path / "gpt2"
    _, model = tiny_models.make("gpt2")
    model.save_pretrained(folder)
    tiny_models.tokenizer().save_pretrained(folder)
    embedding = model.get_input_embeddings().weight
    sizes = Sizes(vocab=384, target_layers=3, taps=(0, 1))
    written = write_deepspec(tmp_path / "draft", sizes=sizes, tables=(embedding, embedding), mask_token_id=5)
    found = check_pair(resolve(str(folder)), recognise(str(written.folder)))
    assert of(found, "embedding").severity == of(found, "head").severity == "ok"
    assert of(found, "rope").found == "the model has no rotary settings to compare" and found.ok


# Draft models and reports


def draft_model(folder: Path, tokens: int, rows: int) -> Checkpoint:
    _, model = tiny_models.make("llama", vocab_size=rows)
    model.save_pretrained(folder)
    tiny_models.tokenizer(tokens).save_pretrained(folder)
    return resolve(str(folder))


def test_a_language_model_as_draft(tmp_path: Path, target: Target) -> None:
    found = check_pair(target.checkpoint, draft_model(tmp_path / "draft", 384, 384))
    assert found.ok and found.format == "draft model" and isinstance(found.fitted, Checkpoint)
    assert "from 384 on they are padding" in of(found, "vocabulary").found


def test_a_language_model_with_another_tokenizer(tmp_path: Path, target: Target) -> None:
    found = check_pair(target.checkpoint, draft_model(tmp_path / "draft", 300, 400))
    only_error(found, TokenizerMismatch, "tokenizer")
    with pytest.raises(TokenizerMismatch, match="84 tokens only the model has"):
        require_pair(target.checkpoint, resolve(str(tmp_path / "draft")))


def test_all_findings_are_collected(tmp_path: Path, target: Target) -> None:
    sizes = Sizes(hidden=32, theta=5e5, taps=(1, 3, 9), vocab=300)
    written = write_zlab(
        tmp_path / "draft",
        sizes=sizes,
        num_target_layers=12,
        dflash_config={**zlab_config(1), "target_layer_ids": [1, 3, 9]},
    )
    tiny_models.tokenizer(300).save_pretrained(written.folder)
    found = report(target, written, drafts=8)
    names = ["tokenizer", "vocabulary", "hidden_size", "depth", "taps", "block_size", "mask_token", "rope"]
    assert [finding.id for finding in found.errors] == names
    error = found.error()
    assert type(error) is DraftMismatch and all(f"[{name}]" in str(error) for name in names)
    assert len({finding.message for finding in found.errors}) == len(names)
    with pytest.raises(DraftMismatch):
        require_pair(target.checkpoint, recognise(str(written.folder)))
    content = json.loads(json.dumps(found.to_dict()))
    assert not content["ok"] and content["findings"][0]["error"] == "TokenizerMismatch"
    assert all(set(entry) == {"id", "severity", "asked", "found", "fix", "error"} for entry in content["findings"])
