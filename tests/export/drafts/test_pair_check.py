"""Every way a draft can fail to fit its model has a finding, a message and an error of its own; all are reported."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dspark_export.checkpoints import Checkpoint, resolve
from dspark_export.checkpoints.drafts import DraftCheckpoint, recognise
from dspark_export.checkpoints.tokenizer import MissingTokenizer
from dspark_export.pair_check import Finding, PairReport, PairWarning, check_pair, embeddings, require_pair
from dspark_runtime.errors import (
    BlockSizeMismatch,
    DraftMismatch,
    EmbeddingsMismatch,
    HiddenSizeMismatch,
    MaskTokenMismatch,
    RopeMismatch,
    TapsMismatch,
    TokenizerMismatch,
    VocabularyMismatch,
)
from tests import tiny_models
from tests.export.checkpoint_samples import edit_config
from tests.export.drafts.conftest import Target
from tests.export.drafts.writers import (
    TARGET_TOKENS,
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

Edit = Callable[[dict[str, Any]], Any]


def give_tokenizer(folder: Path, edit: Edit | None = None) -> None:
    """The target's tokenizer files, changed."""
    tiny_models.tokenizer(TARGET_TOKENS).save_pretrained(folder)
    if edit is not None:
        path = folder / "tokenizer.json"
        content = json.loads(path.read_text())
        edit(content)
        path.write_text(json.dumps(content))


def report(target: Target, written: Written, **options: Any) -> PairReport:
    return check_pair(target.checkpoint, recognise(str(written.folder)), **options)


def only_error(found: PairReport, kind: type[DraftMismatch], name: str) -> Finding:
    """The one error, which a build raises as ``kind`` and which says what to do."""
    assert [finding.id for finding in found.errors] == [name], [finding.message for finding in found.errors]
    error = found.error()
    assert error is not None and type(error) is kind and error.exit_code == 9
    finding = found.errors[0]
    assert finding.error is kind and finding.fix and finding.message in str(error)
    assert found.draft in str(error) and found.target in str(error) and found.fitted is None
    return finding


def of(found: PairReport, name: str) -> Finding:
    (finding,) = (finding for finding in found.findings if finding.id == name)
    return finding


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


# Tokenizers


def swap(vocabulary: dict[str, int]) -> None:
    one, two = list(vocabulary)[40:42]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]


def not_special(content: dict[str, Any]) -> None:
    content["added_tokens"][4]["special"] = False


TOKENIZERS: dict[str, tuple[Edit, str]] = {
    "ids": (lambda content: swap(content["model"]["vocab"]), "2 tokens have other ids"),
    "merges": (lambda content: content["model"]["merges"].reverse(), "merges differ from number 0 on"),
    "normalizer": (lambda content: content.update(normalizer={"type": "NFC"}), "other normalizer"),
    "pre-tokenizer": (lambda content: content["pre_tokenizer"].update(add_prefix_space=True), "other pre-tokenizer"),
    "special": (not_special, "special tokens differ: '<|assistant|>'"),
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_tokenizers_of_equal_size_that_differ(tmp_path: Path, target: Target, case: str) -> None:
    edit, says = TOKENIZERS[case]
    written = write_zlab(tmp_path / "draft")
    give_tokenizer(written.folder, edit)
    finding = only_error(report(target, written), TokenizerMismatch, "tokenizer")
    assert says in finding.found


def test_another_end_of_text(tmp_path: Path, target: Target) -> None:
    written = write_zlab(tmp_path / "draft")
    give_tokenizer(written.folder)
    path = written.folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": "<|assistant|>"}))
    finding = only_error(report(target, written), TokenizerMismatch, "tokenizer")
    assert "eos_token is 1 for the model and 4 for the draft" in finding.found


def test_a_smaller_tokenizer(tmp_path: Path, target: Target) -> None:
    written = write_zlab(tmp_path / "draft")
    tiny_models.tokenizer(300).save_pretrained(written.folder)
    finding = only_error(report(target, written), TokenizerMismatch, "tokenizer")
    assert "84 tokens only the model has" in finding.found


def test_a_mask_token_added_for_the_draft_is_fine(tmp_path: Path, target: Target) -> None:
    written = write_zlab(tmp_path / "draft")
    tokenizer = tiny_models.tokenizer(TARGET_TOKENS)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|MASK|>"]})
    tokenizer.save_pretrained(written.folder)
    found = report(target, written)
    assert found.ok and of(found, "tokenizer").found == "equal, 384 tokens; the draft adds '<|MASK|>'"
    tiny_models.tokenizer(TARGET_TOKENS)  # shared by tests: has to be as it was
    assert target.checkpoint.tokenizer is not None
    assert "<|MASK|>" not in target.checkpoint.tokenizer.backend.get_vocab()


def test_a_damaged_tokenizer(tmp_path: Path, target: Target) -> None:
    written = write_zlab(tmp_path / "draft")
    (written.folder / "tokenizer.json").write_text("{")
    finding = only_error(report(target, written), TokenizerMismatch, "tokenizer")
    assert "cannot be loaded" in finding.found


def test_without_tokenizer_files_there_is_a_warning(tmp_path: Path, target: Target) -> None:
    found = report(target, write_zlab(tmp_path / "draft"))
    assert found.ok and [finding.id for finding in found.warnings] == ["tokenizer"]
    assert "the draft comes without tokenizer files" in found.warnings[0].message


# Vocabularies


def test_padding_rows_are_allowed_and_never_drafted(tmp_path: Path, target: Target) -> None:
    written = write_specforge(tmp_path / "draft", sizes=Sizes(vocab=390), dflash_config=None)
    edit_config(written.folder, dflash_config=_inner(mask_token_id=399))
    found = report(target, written)
    assert found.ok and "from 384 on they are padding, which is never drafted" in of(found, "vocabulary").found
    fitted = found.fitted
    assert isinstance(fitted, DraftCheckpoint) and fitted.target_ids is not None
    assert torch.equal(fitted.target_ids, torch.arange(384))
    table = fitted.tensors["markov_head.markov_w1.weight"]
    assert table.shape == (400, 8), "any token the model can give has a row"
    assert torch.equal(table[:390], written.tensors["markov_head.markov_w1.weight"]) and not table[390:].any()
    assert fitted.tensors["markov_head.markov_w2.weight"].shape == (390, 8)


def _inner(**changes: Any) -> dict[str, Any]:
    return {
        "target_layer_ids": [1, 3, 5],
        "projector_type": "dspark",
        "markov_rank": 8,
        "markov_head_type": "vanilla",
        "enable_confidence_head": True,
        "confidence_head_with_markov": True,
        **changes,
    }


@pytest.mark.parametrize("vocab", [383, 200])
def test_a_vocabulary_smaller_than_the_tokenizer(tmp_path: Path, target: Target, vocab: int) -> None:
    found = report(target, write_zlab(tmp_path / "draft", sizes=Sizes(vocab=vocab), dflash_config=_zlab(399)))
    finding = only_error(found, VocabularyMismatch, "vocabulary")
    assert finding.found == f"the model has 400 rows for 384 tokens, the draft {vocab}"


def _zlab(mask: int) -> dict[str, Any]:
    return {"target_layer_ids": [1, 3, 5], "mask_token_id": mask}


def test_without_the_models_tokenizer_sizes_have_to_be_equal(tmp_path: Path, target: Target) -> None:
    folder = tmp_path / "target"
    shutil.copytree(target.folder, folder)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / file).unlink(missing_ok=True)
    with pytest.warns(MissingTokenizer):
        bare = resolve(str(folder))
    found = check_pair(bare, recognise(str(write_zlab(tmp_path / "same").folder)))
    assert found.ok and {finding.id for finding in found.warnings} == {"tokenizer", "mask_token"}
    assert "the model comes without tokenizer files" in of(found, "tokenizer").found
    other = write_zlab(tmp_path / "other", sizes=Sizes(vocab=390), dflash_config=_zlab(389))
    finding = only_error(check_pair(bare, recognise(str(other.folder))), VocabularyMismatch, "vocabulary")
    assert "without the model's tokenizer nothing tells padding" in finding.found


def test_a_map_that_leads_outside_the_model(tmp_path: Path, target: Target) -> None:
    written = write_classic_eagle3(tmp_path / "draft", sizes=Sizes(vocab=480), draft_vocab=96)
    change(written.folder, _shift_map)
    finding = only_error(report(target, written), VocabularyMismatch, "vocab_map")
    assert finding.found == "its map leads to id 479, the model has 400 rows"


def _shift_map(loaded: dict[str, torch.Tensor]) -> None:
    ids = torch.arange(96) + 384
    loaded["d2t"] = ids - torch.arange(96)
    loaded["t2d"] = torch.zeros(480, dtype=torch.bool)
    loaded["t2d"][ids] = True


def test_a_map_to_padding_rows_is_a_warning(tmp_path: Path, target: Target) -> None:
    written = write_classic_eagle3(tmp_path / "draft", draft_vocab=400)
    change(written.folder, lambda loaded: loaded.update(d2t=torch.arange(400).flip(0) - torch.arange(400)))
    change(written.folder, lambda loaded: loaded.update(t2d=torch.ones(400, dtype=torch.bool)))
    found = report(target, written)
    assert found.ok and "16 of them are rows behind the model's 384 tokens" in of(found, "vocab_map").found


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
    written = write_zlab(tmp_path / "draft", dflash_config=_zlab(mask))
    finding = only_error(report(target, written), MaskTokenMismatch, "mask_token")
    assert says in finding.found


@pytest.mark.parametrize(("mask", "says"), [(5, "the reserved token '<|system|>'"), (390, "unused")])
def test_mask_tokens_that_no_text_has(tmp_path: Path, target: Target, mask: int, says: str) -> None:
    found = report(target, write_zlab(tmp_path / "draft", dflash_config=_zlab(mask)))
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


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    loaded = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    edit(loaded)
    save_file(loaded, folder / "model.safetensors")


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
        tmp_path / "draft", sizes=sizes, num_target_layers=12, dflash_config={**_zlab(1), "target_layer_ids": [1, 3, 9]}
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
