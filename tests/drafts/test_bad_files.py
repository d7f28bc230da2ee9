"""Drafts whose own files are wrong: each refused with a message that names what is wrong, all at once."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from dspark_export.drafts.formats import recognise
from dspark_runtime.errors import CheckpointError, InvalidConfig, InvalidVocabMap, InvalidWeights
from tests.checkpoints.checkpoint_samples import edit_config
from tests.checkpoints.test_weights import (
    FILE,
    hole,
    missing_shard,
    raw,
    shards,
    write_index,
)
from tests.drafts.conftest import change
from tests.drafts.writers import (
    Sizes,
    Written,
    maps,
    write_classic_eagle3,
    write_deepspec,
    write_specforge,
    write_speculators,
    write_zlab,
)

Write = Callable[..., Written]
GEMMA = partial(write_deepspec, family="gemma4")
EAGLE = partial(write_deepspec, kind="eagle3")
SPEC_EAGLE = partial(write_speculators, kind="eagle3", draft_vocab=96)
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0}


def refused(folder: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        recognise(str(folder))
    return caught.value


def inner(folder: Path, key: str, **changes: Any) -> None:
    """Edit an object inside config.json."""
    values = json.loads((folder / "config.json").read_text())[key] | changes
    edit_config(folder, **{key: {name: value for name, value in values.items() if value is not ...}})


FIELDS: dict[str, tuple[Write, dict[str, Any], str]] = {
    "missing": (write_deepspec, {"block_size": ...}, "block_size is missing"),
    "num_anchors": (write_deepspec, {"num_anchors": ...}, "num_anchors is missing"),
    "hidden_size": (write_deepspec, {"hidden_size": ...}, "hidden_size is missing"),
    "unknown": (write_deepspec, {"block_sise": 4}, "unknown fields block_sise"),
    "text for a number": (write_deepspec, {"block_size": "4"}, "block_size must be a whole number .* '4'"),
    "true for a number": (write_deepspec, {"markov_rank": True}, "markov_rank must be a whole number .* True"),
    "zero": (write_deepspec, {"num_attention_heads": 0}, "num_attention_heads must be a whole number from 1"),
    "negative": (write_deepspec, {"mask_token_id": -1}, "mask_token_id must be a whole number from 0"),
    "epsilon": (write_deepspec, {"rms_norm_eps": 0}, "rms_norm_eps must be a positive number"),
    "flag": (write_deepspec, {"enable_confidence_head": 1}, "enable_confidence_head must be true or false"),
    "markov head": (
        write_deepspec,
        {"markov_head_type": "lstm"},
        "markov_head_type must be one of vanilla, gated, rnn",
    ),
    "no markov head": (write_deepspec, {"markov_head_type": ...}, "markov_head_type is missing"),
    "confidence without markov": (write_deepspec, {"markov_rank": 0}, "markov_rank 0 leaves it nothing to read"),
    "heads": (write_deepspec, {"num_key_value_heads": 3}, "4 attention heads are not a multiple of 3"),
    "odd heads": (write_deepspec, {"head_dim": 15}, "heads of width 15 cannot be rotated"),
    "no head_dim": (
        write_deepspec,
        {"head_dim": ..., "num_attention_heads": 3, "num_key_value_heads": 3},
        "head_dim is missing, and hidden_size 64 is not a multiple of 3",
    ),
    "activation": (write_deepspec, {"hidden_act": "gelu_new2"}, "activation 'gelu_new2' of the draft is unknown"),
    "activation missing": (write_deepspec, {"hidden_act": ...}, "hidden_act is missing"),
    "sliding layers": (write_deepspec, {"layer_types": ["sliding_attention"] * 2}, "drafts of this format do not have"),
    "layer types": (write_deepspec, {"layer_types": ["full_attention"]}, "layer_types must be 2 of"),
    "layer kinds": (write_deepspec, {"layer_types": ["linear_attention"] * 2}, "layer_types must be 2 of"),
    "window without layers": (
        write_deepspec,
        {"layer_types": ..., "use_sliding_window": True},
        "layer_types does not say for which layers",
    ),
    "no rope": (write_deepspec, {"rope_parameters": ...}, "rope_theta is missing"),
    "rope type": (write_deepspec, {"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}, "'spiral' is not"),
    "rope types nobody computes": (
        write_deepspec,
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        "'dynamic' is not supported; default, linear, llama3, yarn are",
    ),
    "rope of Gemma": (
        write_deepspec,
        {"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4}},
        "'proportional' is not supported",
    ),
    "rope field": (
        write_deepspec,
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 2]}},
        "mrope_section means nothing for rope_type default",
    ),
    "rope fields missing": (write_deepspec, {"rope_parameters": LLAMA3}, "low_freq_factor.*original_max.* missing"),
    "rope theta": (write_deepspec, {"rope_parameters": {"rope_theta": -1.0}}, "rope_theta must be a positive number"),
    "two thetas": (write_deepspec, {"rope_theta": 5e5}, "rope_theta is 500000.0 and 10000.0 in rope_parameters"),
    "two scalings": (write_deepspec, {"rope_scaling": LLAMA3}, "rope_parameters and rope_scaling say different things"),
    "partial rope": (
        write_deepspec,
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        "partial_rotary_factor 0.5 is supported for rope_type proportional only",
    ),
    "quantized": (write_deepspec, {"quantization_config": {"bits": 4}}, "quantization_config .* is not supported"),
    "softcap of attention": (write_deepspec, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0"),
    "softcap of the head": (write_deepspec, {"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0"),
    "bias in the mlp": (write_deepspec, {"mlp_bias": True}, "mlp_bias True is not supported, it has to be False"),
    "tied": (write_deepspec, {"tie_word_embeddings": True}, "tie_word_embeddings True"),
    "taps not ascending": (write_deepspec, {"target_layer_ids": [3, 1, 5]}, "target_layer_ids must be ascending"),
    "a tap twice": (write_deepspec, {"target_layer_ids": [1, 1, 5]}, "target_layer_ids must be ascending"),
    "no taps": (write_deepspec, {"target_layer_ids": []}, "target_layer_ids must be ascending"),
    "taps missing": (write_deepspec, {"target_layer_ids": ...}, "target_layer_ids is missing"),
    "tap -2": (write_deepspec, {"target_layer_ids": [-2, 1, 5]}, "ascending layer numbers from -1"),
    "embedding tapped by eagle3": (EAGLE, {"target_layer_ids": [-1, 1, 3, 5, 6]}, "ascending layer numbers from 0"),
    "eagle3 of two layers": (EAGLE, {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2}, "one layer are"),
    "ttt_length": (EAGLE, {"ttt_length": ...}, "ttt_length is missing"),
    "moe": (GEMMA, {"enable_moe_block": True}, "enable_moe_block True"),
    "per layer input": (GEMMA, {"hidden_size_per_layer_input": 16}, "hidden_size_per_layer_input 16"),
    "gemma heads": (GEMMA, {"global_head_dim": ...}, "global_head_dim is missing"),
    "gemma heads that differ": (
        GEMMA,
        {"global_head_dim": ..., "per_layer_config": {"1": {"head_dim": 16}, "2": {"head_dim": 8}}},
        "per_layer_config does not give one for all layers",
    ),
    "no dflash_config": (write_zlab, {"dflash_config": ...}, "dflash_config is missing"),
    "no block size": (write_zlab, {"block_size": ...}, "block_size is missing"),
    "a block of the anchor alone": (write_zlab, {"block_size": 1}, "block_size must be a whole number from 2"),
    "dflash with a markov head": (write_zlab, {"markov_rank": 8}, "markov_rank 8 is not supported"),
    "causal full attention": (write_zlab, {"causal": True}, "causal True is not supported"),
    "sliding layers that do not say": (
        write_zlab,
        {"layer_types": ["sliding_attention"] * 2, "sliding_window": 8},
        "causal is missing",
    ),
    "sliding layers without width": (
        write_zlab,
        {"layer_types": ["sliding_attention"] * 2, "causal": True},
        "sliding_window is missing",
    ),
    "two masks": (write_specforge, {"mask_token_id": 3}, "mask_token_id is 3, and 399 in dflash_config"),
    "no layers": (write_speculators, {"transformer_layer_config": ...}, "transformer_layer_config is missing"),
    "layers that are not an object": (
        write_speculators,
        {"transformer_layer_config": 3},
        "transformer_layer_config must be an",
    ),
    "domino": (write_speculators, {"projector_type": "domino"}, "projector_type 'domino' is not supported"),
    "another width": (write_speculators, {"target_hidden_size": 128}, "target_hidden_size 128 is not supported"),
    "draft vocabulary too large": (write_speculators, {"draft_vocab_size": 401}, "draft_vocab_size .* to 400"),
    "more drafts than the block has": (
        partial(write_speculators, kind="dflash"),
        {"speculators_config": {"proposal_methods": [{"speculative_tokens": 4}]}},
        "speculative_tokens is 4, but a block of 4 drafts 3 with sample_from_anchor false",
    ),
    "norm_before_residual": (SPEC_EAGLE, {"norm_before_residual": ...}, "norm_before_residual is missing"),
    "norm_before_fc": (SPEC_EAGLE, {"norm_before_fc": True}, "norm_before_fc True is not supported"),
    "classic of two layers": (write_classic_eagle3, {"num_hidden_layers": 2, "layer_types": ...}, "one layer are"),
}


@pytest.mark.parametrize("case", FIELDS)
def test_fields(tmp_path: Path, case: str) -> None:
    write, changes, says = FIELDS[case]
    written = write(tmp_path / "draft", **changes)
    error = refused(written.folder)
    assert type(error) is InvalidConfig
    assert str(error).startswith(f"{written.folder}: config.json: ")
    with pytest.raises(InvalidConfig, match=says):
        raise error


def test_all_wrong_fields_are_named_at_once(tmp_path: Path) -> None:
    written = write_deepspec(tmp_path / "draft", block_size=..., markov_rank="8", hidden_act="none", odd=1, even=2)
    text = str(refused(written.folder))
    for part in ("block_size is missing", "markov_rank must be", "activation 'none'", "unknown fields even, odd"):
        assert part in text


def test_fields_inside_objects_are_named_with_their_place(tmp_path: Path) -> None:
    folder = write_speculators(tmp_path / "a").folder
    inner(folder, "transformer_layer_config", hidden_size=..., surprise=1)
    text = str(refused(folder))
    assert "transformer_layer_config.hidden_size is missing" in text
    assert "unknown fields transformer_layer_config.surprise" in text
    folder = write_specforge(tmp_path / "b").folder
    inner(folder, "dflash_config", markov_head_type=..., kda=1)
    text = str(refused(folder))
    assert "dflash_config.markov_head_type is missing" in text and "unknown fields dflash_config.kda" in text


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "not valid JSON"),
        ("[]", "expected an object"),
        ('{"a": NaN}', "NaN"),
        ('{"a":' * 30 + "1" + "}" * 30, "deep"),
    ],
)
def test_config_that_is_no_config(tmp_path: Path, content: str, says: str) -> None:
    folder = write_deepspec(tmp_path / "draft").folder
    (folder / "config.json").write_text(content)
    error = refused(folder)
    assert type(error) is InvalidConfig and says in str(error)


# Tensors


def test_missing_and_unknown_tensors_are_named_at_once(tmp_path: Path) -> None:
    folder = write_deepspec(tmp_path / "draft").folder

    def edit(loaded: dict[str, torch.Tensor]) -> None:
        del loaded["fc.weight"], loaded["layers.1.self_attn.q_norm.weight"]
        loaded["layers.2.mlp.up_proj.weight"] = torch.ones(3)
        loaded["fc.bias"] = torch.ones(64)

    change(folder, edit)
    error = refused(folder)
    assert type(error) is InvalidWeights
    assert "lacks fc.weight, layers.1.self_attn.q_norm.weight" in str(error)
    assert "has fc.bias, layers.2.mlp.up_proj.weight" in str(error)


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (write_deepspec, "markov_head.markov_w2.weight"),
        (write_deepspec, "confidence_head.proj.bias"),
        (partial(write_deepspec, markov="gated"), "markov_head.gate_proj.bias"),
        (partial(write_deepspec, markov="rnn"), "markov_head.joint_proj.weight"),
        (GEMMA, "layers.0.layer_scalar"),
        (EAGLE, "layers.0.hidden_norm.weight"),
        (write_zlab, "hidden_norm.weight"),
        (write_specforge, "markov_head.markov_w1.weight"),
        (SPEC_EAGLE, "norm.weight"),
        (write_classic_eagle3, "midlayer.input_layernorm.weight"),
    ],
)
def test_each_format_needs_its_tensors(tmp_path: Path, write: Write, name: str) -> None:
    folder = write(tmp_path / "draft").folder
    change(folder, lambda loaded: loaded.pop(name))
    error = refused(folder)
    assert type(error) is InvalidWeights and f"lacks {name.replace('midlayer', 'layers.0')};" in str(error)


def test_heads_the_config_turns_off_are_unknown(tmp_path: Path) -> None:
    folder = write_deepspec(tmp_path / "draft", markov_rank=0, confidence_head_with_markov=False).folder
    assert "has markov_head.markov_w1.weight, markov_head.markov_w2.weight, which a DeepSpec" in str(refused(folder))


def test_wrong_shapes_are_named_with_both(tmp_path: Path) -> None:
    folder = write_deepspec(tmp_path / "draft", intermediate_size=80).folder
    error = refused(folder)
    assert type(error) is InvalidWeights
    assert "layers.0.mlp.gate_proj.weight is [96, 64] instead of [80, 64]" in str(error)
    assert "layers.1.mlp.down_proj.weight is [64, 96] instead of [64, 80]" in str(error)


def test_fewer_taps_than_fc_takes(tmp_path: Path) -> None:
    folder = write_deepspec(tmp_path / "draft", target_layer_ids=[1, 3]).folder
    assert "fc.weight is [64, 192] instead of [64, 128]" in str(refused(folder))


@pytest.mark.parametrize(
    ("value", "says"), [(float("nan"), "NaN"), (float("inf"), "infinite"), (-float("inf"), "infinite")]
)
@pytest.mark.parametrize("name", ["layers.1.mlp.up_proj.weight", "embed_tokens.weight"])
def test_nan_and_infinity(tmp_path: Path, value: float, says: str, name: str) -> None:
    folder = write_deepspec(tmp_path / "draft").folder
    change(folder, lambda loaded: loaded[name].view(-1).__setitem__(7, value))
    error = refused(folder)
    assert type(error) is InvalidWeights and f"{name} has {says}" in str(error)


def test_whole_numbers_are_no_weights(tmp_path: Path) -> None:
    folder = write_deepspec(tmp_path / "draft").folder
    change(folder, lambda loaded: loaded.update({"fc.weight": loaded["fc.weight"].to(torch.int8)}))
    error = refused(folder)
    assert type(error) is InvalidWeights and "'fc.weight' as I8" in str(error)


def outside(folder: Path) -> None:
    (folder / FILE).rename(folder.parent / "elsewhere.safetensors")
    (folder / FILE).symlink_to(folder.parent / "elsewhere.safetensors")


def pipe(folder: Path) -> None:
    (folder / FILE).unlink()
    os.mkfifo(folder / FILE)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (raw(lambda data: data[:100]), "cut short"),
        (raw(lambda data: data[:-10]), "cut short"),
        (raw(lambda data: data + b"0123"), "bytes after its last tensor"),
        (hole, "unused bytes"),
        (missing_shard, "missing"),
        (
            lambda folder: write_index(folder, {**shards(folder), "fc.weight": "../x.safetensors"}),
            "not a safetensors file",
        ),
        (outside, "symlink"),
        (pipe, "pipe"),
        (lambda folder: (folder / FILE).unlink(), "neither model.safetensors"),
    ],
)
def test_damaged_weight_files(tmp_path: Path, damage: Callable[[Path], None], says: str) -> None:
    folder = write_deepspec(tmp_path / "draft").folder
    damage(folder)
    error = refused(folder)
    assert type(error) is InvalidWeights and says in str(error)


# Maps of reduced vocabularies


def ids(start: int = 0, count: int = 96) -> torch.Tensor:
    return torch.arange(count) * 4 + start


MAPS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "missing": (lambda loaded: loaded.pop("d2t"), "drafts from 96 of 400 tokens and has no d2t"),
    "partial": (lambda loaded: loaded.update(d2t=loaded["d2t"][:90]), r"d2t is \[90\] instead of \[96\]"),
    "partial t2d": (lambda loaded: loaded.update(t2d=loaded["t2d"][:90]), r"t2d is \[90\] instead of \[400\]"),
    "too high": (lambda loaded: loaded["d2t"].__setitem__(95, 400), "1 ids outside the vocabulary of 400, e.g. 495"),
    "negative": (lambda loaded: loaded["d2t"].__setitem__(0, -1), "1 ids outside the vocabulary of 400, e.g. -1"),
    "ids instead of offsets": (lambda loaded: loaded.update(d2t=ids(20)), "entries are offsets"),
    "twice": (lambda loaded: loaded["d2t"].__setitem__(1, -1), "leads to target id 0 twice"),
    "t2d of another map": (lambda loaded: loaded.update(t2d=maps(ids(1), 400)["t2d"]), "t2d and d2t disagree about"),
}


@pytest.mark.parametrize("write", [write_classic_eagle3, SPEC_EAGLE, partial(write_speculators, draft_vocab=96)])
@pytest.mark.parametrize("case", MAPS)
def test_vocabulary_maps(tmp_path: Path, write: Write, case: str) -> None:
    edit, says = MAPS[case]
    folder = write(tmp_path / "draft").folder
    change(folder, edit)
    with pytest.raises(InvalidVocabMap, match=says):
        recognise(str(folder))


def test_a_map_of_floats_is_no_map(tmp_path: Path) -> None:
    folder = write_classic_eagle3(tmp_path / "draft").folder
    change(folder, lambda loaded: loaded.update(d2t=loaded["d2t"].float()))
    assert "d2t is F32" in str(refused(folder))


def test_a_full_vocabulary_needs_no_map(tmp_path: Path) -> None:
    folder = write_classic_eagle3(tmp_path / "draft", draft_vocab=400, sizes=Sizes(vocab=416)).folder
    edit_config(folder, vocab_size=400)
    change(folder, lambda loaded: (loaded.pop("d2t"), loaded.pop("t2d")))
    draft = recognise(str(folder))
    assert draft.target_ids is None  # type: ignore[union-attr]
