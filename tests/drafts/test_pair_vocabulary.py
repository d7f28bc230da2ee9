"""Pairs whose tokenizers or vocabularies differ."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from dspark_export.checkpoints import resolve
from dspark_export.checkpoints.tokenizer import MissingTokenizer
from dspark_export.drafts.formats import DraftCheckpoint, recognise
from dspark_export.drafts.pair_check import check_pair
from dspark_runtime.errors import (
    InvalidConfig,
    InvalidVocabMap,
    TokenizerMismatch,
    VocabularyMismatch,
)
from tests import tiny_models
from tests.checkpoints.checkpoint_samples import edit_config
from tests.drafts.conftest import Target, change
from tests.drafts.pair_reports import Edit, give_tokenizer, of, only_error, report, zlab_config
from tests.drafts.writers import (
    TARGET_TOKENS,
    Sizes,
    write_classic_eagle3,
    write_specforge,
    write_zlab,
)

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
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_tokenizers_of_equal_size_that_differ(tmp_path: Path, target: Target, case: str) -> None:
    edit, says = TOKENIZERS[case]
    written = write_zlab(tmp_path / "draft")
    give_tokenizer(written.folder, edit)
    finding = only_error(report(target, written), TokenizerMismatch, "tokenizer")
    assert says in finding.found


def test_rules_written_otherwise_that_split_alike_are_a_note(tmp_path: Path, target: Target) -> None:
    """Converted tokenizer files spell their rules in other ways than the originals."""
    written = write_zlab(tmp_path / "draft")
    give_tokenizer(
        written.folder,
        lambda content: content.update(
            pre_tokenizer={"type": "Sequence", "pretokenizers": [content["pre_tokenizer"]]},
            normalizer={"type": "Sequence", "normalizers": []},
        ),
    )
    found = report(target, written)
    assert found.ok
    assert "another spelling of the normalizer and pre-tokenizer" in of(found, "tokenizer").found


def rename_added(content: dict[str, Any]) -> None:
    """Another text for the special token 5, as a finetune for chats has."""
    token = content["added_tokens"][5]
    content["model"]["vocab"]["<|im_start|>"] = content["model"]["vocab"].pop(token["content"])
    token["content"] = "<|im_start|>"


ADDED: dict[str, tuple[Edit, str]] = {
    "flags": (not_special, "special tokens differ: '<|assistant|>'"),
    "texts": (rename_added, "1 added tokens only the draft has, e.g. '<|im_start|>'"),
}


@pytest.mark.parametrize("case", ADDED)
def test_other_added_tokens_are_a_warning(tmp_path: Path, target: Target, case: str) -> None:
    edit, says = ADDED[case]
    written = write_zlab(tmp_path / "draft")
    give_tokenizer(written.folder, edit)
    found = report(target, written)
    assert found.ok and of(found, "tokenizer").severity == "warning"
    assert says in of(found, "tokenizer").found


def test_another_end_of_text_is_a_warning(tmp_path: Path, target: Target) -> None:
    written = write_zlab(tmp_path / "draft")
    give_tokenizer(written.folder)
    path = written.folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": "<|assistant|>"}))
    found = report(target, written)
    assert found.ok and of(found, "tokenizer").severity == "warning"
    assert "eos_token is 1 for the model and 4 for the draft" in of(found, "tokenizer").found


# Maps of reduced vocabularies that say something else than they should


def test_a_map_of_the_models_ids_is_read_as_such(tmp_path: Path, target: Target) -> None:
    """With t2d there is no doubt; without it only where they cannot be offsets."""
    written = write_classic_eagle3(tmp_path / "draft")
    ids = written.target_ids
    assert ids is not None
    change(written.folder, lambda loaded: loaded.update(d2t=ids.clone()))
    found = report(target, written)
    assert found.fitted is not None and torch.equal(found.fitted.target_ids, ids)  # type: ignore[union-attr]
    assert "the model's ids themselves" in of(found, "vocab_map").found
    outside = ids + 16  # as offsets, the last would lead to id 396 + 95
    change(written.folder, lambda loaded: (loaded.pop("t2d"), loaded.update(d2t=outside)))
    draft = recognise(str(written.folder))
    assert isinstance(draft, DraftCheckpoint) and draft.target_ids is not None
    assert torch.equal(draft.target_ids, outside)


def test_a_map_that_could_be_either_is_a_warning(tmp_path: Path, target: Target) -> None:
    written = write_classic_eagle3(tmp_path / "draft", draft_vocab=40)
    change(written.folder, lambda loaded: loaded.pop("t2d"))
    found = report(target, written)
    assert found.ok and of(found, "vocab_map").severity == "warning"
    assert "could hold offsets or the model's ids" in of(found, "vocab_map").found


@pytest.mark.parametrize("t2d", [False, True])
def test_a_reduced_map_that_was_never_filled_in(tmp_path: Path, t2d: bool) -> None:
    written = write_classic_eagle3(tmp_path / "draft")

    def empty(loaded: dict[str, torch.Tensor]) -> None:
        loaded["d2t"].zero_()
        loaded["t2d"].zero_()
        if not t2d:
            del loaded["t2d"]

    change(written.folder, empty)
    with pytest.raises(InvalidVocabMap, match="the map was never filled in"):
        recognise(str(written.folder))


def test_an_empty_map_of_the_whole_vocabulary(tmp_path: Path, target: Target) -> None:
    written = write_classic_eagle3(tmp_path / "draft", draft_vocab=400)
    empty = {"d2t": torch.zeros(400, dtype=torch.long), "t2d": torch.zeros(400, dtype=torch.bool)}
    change(written.folder, lambda loaded: loaded.update(empty))
    draft = recognise(str(written.folder))
    assert isinstance(draft, DraftCheckpoint) and draft.target_ids is None


def test_what_modelopt_writes(tmp_path: Path) -> None:
    """NVIDIA's exporter names every setting of the layer it has, in the outer config and in eagle_config."""
    eagle = {
        "eagle_aux_hidden_state_layer_ids": [1, 3, 5],
        "use_aux_hidden_state": True,
        "use_input_layernorm_in_first_layer": True,
        "use_last_layernorm": True,
        "use_mtp_layernorm": False,
        "next_layer_regular": True,
        "parallel_draft_step": 1,
        "parallel_draft_heads_num_layers": 1,
    }
    outer = {"rope_scaling": None, "mlp_bias": False, "attention_dropout": 0.0, "pretraining_tp": None}
    draft = recognise(str(write_classic_eagle3(tmp_path / "draft", **outer, eagle_config=eagle).folder))
    assert isinstance(draft, DraftCheckpoint) and draft.config.taps == (1, 3, 5)
    for other in ({"use_mtp_layernorm": True}, {"parallel_draft_step": 2}, {"use_last_layernorm": False}):
        folder = write_classic_eagle3(tmp_path / "other", **outer, eagle_config=eagle | other).folder
        with pytest.raises(InvalidConfig, match=next(iter(other))):
            recognise(str(folder))


def test_what_a_draft_says_it_was_made_for_changes_nothing(tmp_path: Path) -> None:
    fields = {"modal_type": "LLM", "target_model_type": "qwen3"}
    draft = recognise(str(write_classic_eagle3(tmp_path / "draft", **fields).folder))
    plain = recognise(str(write_classic_eagle3(tmp_path / "plain").folder))
    assert isinstance(draft, DraftCheckpoint) and isinstance(plain, DraftCheckpoint) and draft.config == plain.config


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
    found = report(target, write_zlab(tmp_path / "draft", sizes=Sizes(vocab=vocab), dflash_config=zlab_config(399)))
    finding = only_error(found, VocabularyMismatch, "vocabulary")
    assert finding.found == f"the model has 400 rows for 384 tokens, the draft {vocab}"


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
    other = write_zlab(tmp_path / "other", sizes=Sizes(vocab=390), dflash_config=zlab_config(389))
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
    assert found.ok and "16 of them are rows after the model's 384 tokens" in of(found, "vocab_map").found
