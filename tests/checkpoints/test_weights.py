"""Weight files and tokenizers: damage, contradictions and escapes end as typed errors, and nothing is written."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from dspark_export.checkpoints import resolve
from dspark_export.checkpoints.safetensors_file import read_header
from dspark_runtime.errors import InvalidConfig, InvalidTokenizer, InvalidWeights, UntrustedCheckpoint
from tests.checkpoints.checkpoint_samples import (
    VOCAB,
    byte_tokenizer,
    edit_config,
    read_safetensors,
    refusal,
    write_checkpoint,
    write_safetensors,
)

Damage = Callable[[Path], None]
FILE = "model.safetensors"
NORM = "model.norm.weight"
GATE = "model.layers.0.mlp.gate_proj.weight"


def header(change: Callable[[dict[str, Any]], Any]) -> Damage:
    """Change the header and keep the payload."""

    def damage(folder: Path) -> None:
        entries, payload = read_safetensors(folder / FILE)
        changed = change(entries)
        write_safetensors(folder / FILE, entries if changed is None else changed, payload)

    return damage


def raw(change: Callable[[bytes], bytes]) -> Damage:
    def damage(folder: Path) -> None:
        (folder / FILE).write_bytes(change((folder / FILE).read_bytes()))

    return damage


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Damage:
    """Change tensors and store them properly."""

    def damage(folder: Path) -> None:
        loaded = {name: tensor.clone() for name, tensor in load_file(folder / FILE).items()}
        change(loaded)
        save_file(loaded, folder / FILE, {"format": "pt"})

    return damage


def entry(name: str, **changes: Any) -> Damage:
    return header(lambda entries: entries[name].update(changes))


def twice(entries: dict[str, Any]) -> str:
    text = json.dumps(entries)
    return text[:-1] + f', "{NORM}": {json.dumps(entries[NORM])}}}'


def overlap(entries: dict[str, Any]) -> None:
    start, end = entries[NORM]["data_offsets"]
    entries[NORM]["data_offsets"] = [start - 4, end - 4]


def hole(folder: Path) -> None:
    entries, payload = read_safetensors(folder / FILE)
    cut = sorted(value["data_offsets"][0] for key, value in entries.items() if key != "__metadata__")[3]
    for key, value in entries.items():
        if key != "__metadata__" and value["data_offsets"][0] >= cut:
            value["data_offsets"] = [offset + 8 for offset in value["data_offsets"]]
    write_safetensors(folder / FILE, entries, payload[:cut] + bytes(8) + payload[cut:])


def empty_tensor(entries: dict[str, Any]) -> None:
    start = entries[NORM]["data_offsets"][0]
    entries["extra"] = {"dtype": "F32", "shape": [0], "data_offsets": [start, start]}


def poison(value: float) -> Damage:
    def change(loaded: dict[str, torch.Tensor]) -> None:
        loaded[GATE][3, 5] = value

    return tensors(change)


def shards(
    folder: Path, names: tuple[str, str] = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
) -> dict[str, str]:
    loaded = load_file(folder / FILE)
    keys = sorted(loaded)
    parts = {names[0]: keys[: len(keys) // 2], names[1]: keys[len(keys) // 2 :]}
    for file, part in parts.items():
        save_file({key: loaded[key] for key in part}, folder / file, {"format": "pt"})
    (folder / FILE).unlink()
    mapping = {key: file for file, part in parts.items() for key in part}
    write_index(folder, mapping)
    return mapping


def write_index(folder: Path, mapping: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": mapping}))


def missing_shard(folder: Path) -> None:
    shards(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def index_naming(file: str) -> Damage:
    def damage(folder: Path) -> None:
        write_index(folder, {**shards(folder), NORM: file})

    return damage


def index_of(mapping: Any) -> Damage:
    def damage(folder: Path) -> None:
        shards(folder)
        write_index(folder, mapping)

    return damage


def index_with_a_tensor_too_many(folder: Path) -> None:
    write_index(folder, {**shards(folder), "model.extra": "model-00001-of-00002.safetensors"})


def tensor_in_two_shards(folder: Path) -> None:
    shards(folder)
    second = folder / "model-00002-of-00002.safetensors"
    first = next(iter(load_file(folder / "model-00001-of-00002.safetensors").items()))
    save_file({**load_file(second), first[0]: first[1]}, second, {"format": "pt"})


def symlink_out(folder: Path) -> None:
    shutil.move(folder / FILE, folder.parent / "elsewhere.safetensors")
    (folder / FILE).symlink_to(folder.parent / "elsewhere.safetensors")


def dangling(folder: Path) -> None:
    (folder / FILE).unlink()
    (folder / FILE).symlink_to("nowhere.safetensors")


def symlink_loop(folder: Path) -> None:
    (folder / FILE).unlink()
    (folder / FILE).symlink_to(FILE)


def hard_link(folder: Path) -> None:
    os.link(folder / FILE, folder.parent / "elsewhere.safetensors")


def pipe(folder: Path) -> None:
    (folder / FILE).unlink()
    os.mkfifo(folder / FILE)


def directory(folder: Path) -> None:
    (folder / FILE).unlink()
    (folder / FILE).mkdir()


def no_weights(folder: Path) -> None:
    (folder / FILE).unlink()


def only_pickle(folder: Path) -> None:
    (folder / FILE).unlink()
    torch.save({NORM: torch.ones(32)}, folder / "pytorch_model.bin")


def only_adapter(folder: Path) -> None:
    (folder / FILE).rename(folder / "adapter_model.safetensors")


def untied_head(folder: Path) -> None:
    tensors(lambda loaded: loaded.update({"lm_head.weight": torch.ones(VOCAB, 32)}))(folder)


WEIGHTS: dict[str, tuple[Damage, type[Exception], str]] = {
    "empty file": (raw(lambda data: b""), InvalidWeights, "cut short"),
    "7 bytes": (raw(lambda data: data[:7]), InvalidWeights, "cut short"),
    "header cut": (raw(lambda data: data[:100]), InvalidWeights, "cut short"),
    "payload cut": (raw(lambda data: data[:-1]), InvalidWeights, "cut short"),
    "bytes appended": (raw(lambda data: data + b"x"), InvalidWeights, "after its last tensor"),
    "header longer than file": (
        raw(lambda data: struct.pack("<Q", len(data)) + data[8:]),
        InvalidWeights,
        "cut short",
    ),
    "header length 2**63": (raw(lambda data: struct.pack("<Q", 2**63) + data[8:]), InvalidWeights, "cut short"),
    "header no json": (header(lambda entries: "{"), InvalidWeights, "no valid safetensors header"),
    "header a list": (header(lambda entries: "[]"), InvalidWeights, "not a JSON object"),
    "header nested": (header(lambda entries: '{"a":' * 50_000 + "1" + "}" * 50_000), InvalidWeights, "header"),
    "entry no object": (header(lambda entries: {**entries, NORM: 1}), InvalidWeights, NORM),
    "entry with more keys": (entry(NORM, more=1), InvalidWeights, "exactly"),
    "unknown dtype": (entry(NORM, dtype="F31"), InvalidWeights, "F31"),
    "dtype of another size": (entry(NORM, dtype="F16"), InvalidWeights, NORM),
    "negative shape": (entry(NORM, shape=[-32]), InvalidWeights, "shape"),
    "bool shape": (entry(NORM, shape=[True]), InvalidWeights, "shape"),
    "huge shape": (entry(NORM, shape=[2**40, 2**40]), InvalidWeights, NORM),
    "offsets backwards": (entry(NORM, data_offsets=[128, 0]), InvalidWeights, NORM),
    "offsets negative": (entry(NORM, data_offsets=[-128, 0]), InvalidWeights, "data_offsets"),
    "overlap": (header(overlap), InvalidWeights, "overlaps"),
    "hole": (hole, InvalidWeights, "unused bytes"),
    "same tensor twice": (header(twice), InvalidWeights, "twice"),
    "zero-size tensor": (header(empty_tensor), InvalidWeights, "empty"),
    "wrong shape": (
        tensors(lambda loaded: loaded.update({GATE: loaded[GATE][:, :-1].contiguous()})),
        InvalidWeights,
        "shape",
    ),
    "transposed": (tensors(lambda loaded: loaded.update({GATE: loaded[GATE].T.contiguous()})), InvalidWeights, "shape"),
    "wrong dtype": (
        tensors(lambda loaded: loaded.update({GATE: loaded[GATE].to(torch.int8)})),
        InvalidWeights,
        "I8",
    ),
    "missing tensor": (tensors(lambda loaded: loaded.pop(GATE)), InvalidWeights, "lacks 1 weights"),
    "config has more layers": (lambda folder: edit_config(folder, num_hidden_layers=3), InvalidWeights, "lacks"),
    "config has another width": (lambda folder: edit_config(folder, intermediate_size=128), InvalidWeights, "shape"),
    "head missing, not tied": (
        lambda folder: edit_config(folder, tie_word_embeddings=False),
        InvalidWeights,
        "tie_word_embeddings",
    ),
    "head differs, tied": (untied_head, InvalidConfig, "tie_word_embeddings"),
    "NaN": (poison(float("nan")), InvalidWeights, "NaN"),
    "infinity": (poison(float("inf")), InvalidWeights, "infinite"),
    "minus infinity": (poison(float("-inf")), InvalidWeights, "infinite"),
    "no weights": (no_weights, InvalidWeights, "neither"),
    "only an adapter": (only_adapter, InvalidWeights, "adapter_model.safetensors"),
    "only a pickle": (only_pickle, UntrustedCheckpoint, "--allow-unsafe-checkpoint"),
    "missing shard": (missing_shard, InvalidWeights, "missing"),
    "shard ../x": (index_naming("../elsewhere.safetensors"), InvalidWeights, "../elsewhere"),
    "shard absolute": (index_naming("/etc/passwd"), InvalidWeights, "/etc/passwd"),
    "shard in a folder": (index_naming("a/b.safetensors"), InvalidWeights, "a/b"),
    "shard a pickle": (index_naming("x.bin"), InvalidWeights, "x.bin"),
    "index empty": (index_of({}), InvalidWeights, "weight_map"),
    "index a list": (index_of([]), InvalidWeights, "weight_map"),
    "index to numbers": (index_of({NORM: 1}), InvalidWeights, "weight_map"),
    "index with a tensor too many": (index_with_a_tensor_too_many, InvalidWeights, "model.extra"),
    "tensor in two shards": (tensor_in_two_shards, InvalidWeights, "twice"),
    "symlink out": (symlink_out, InvalidWeights, "symlink"),
    "dangling symlink": (dangling, InvalidWeights, "missing"),
    "symlink loop": (symlink_loop, InvalidWeights, "missing"),
    "hard link": (hard_link, InvalidWeights, "hard link"),
    "pipe": (pipe, InvalidWeights, "pipe"),
    "directory": (directory, InvalidWeights, "folder"),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights_refused(case: str, tmp_path: Path) -> None:
    damage, error, says = WEIGHTS[case]
    folder = write_checkpoint(tmp_path / "model")
    damage(folder)
    caught = refusal(str(folder), tmp_path / "out" / "bundle")
    assert type(caught) is error, repr(caught)
    assert says in str(caught)


STRUCTURE = [case for case, (_, error, _) in WEIGHTS.items() if error is InvalidWeights]


@pytest.mark.parametrize("case", STRUCTURE)
def test_our_header_check_is_at_least_as_strict_as_the_library(case: str, tmp_path: Path) -> None:
    """Whatever the safetensors library refuses to open, read_header refuses too."""
    folder = write_checkpoint(tmp_path / "model")
    WEIGHTS[case][0](folder)
    path = folder / FILE
    if not path.is_file():
        return
    try:
        with safe_open(path, "pt"):
            pass
    except SafetensorError:
        with pytest.raises(InvalidWeights):
            read_header(path)


def replace_tokenizer(text: str) -> Damage:
    return lambda folder: (folder / "tokenizer.json").write_text(text) and None


def larger_tokenizer(folder: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"word{index}" for index in range(100)])
    tokenizer.save(str(folder / "tokenizer.json"))


def tokenizer_symlink(folder: Path) -> None:
    shutil.move(folder / "tokenizer.json", folder.parent / "tokenizer.json")
    (folder / "tokenizer.json").symlink_to(folder.parent / "tokenizer.json")


TOKENIZERS: dict[str, tuple[Damage, str]] = {
    "empty": (replace_tokenizer(""), "cannot be loaded"),
    "not json": (replace_tokenizer("{"), "cannot be loaded"),
    "no model": (replace_tokenizer("{}"), "cannot be loaded"),
    "larger than the embedding": (larger_tokenizer, "320 embedding rows"),
    "symlink out": (tokenizer_symlink, "symlink"),
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_tokenizer_refused(case: str, tmp_path: Path) -> None:
    damage, says = TOKENIZERS[case]
    folder = write_checkpoint(tmp_path / "model")
    damage(folder)
    caught = refusal(str(folder), tmp_path / "out" / "bundle")
    assert type(caught) is InvalidTokenizer, repr(caught)
    assert says in str(caught)


def test_good_checkpoints_are_accepted(tmp_path: Path) -> None:
    whole = resolve(str(write_checkpoint(tmp_path / "whole")))
    assert whole.weights is not None and whole.weights.names == (FILE,)
    sharded = write_checkpoint(tmp_path / "sharded")
    shards(sharded)
    model = resolve(str(sharded)).load_model(torch.float32)
    reference = whole.load_model(torch.float32)
    ids = torch.arange(10)[None]
    assert torch.equal(model(ids).logits, reference(ids).logits)
    assert not any(parameter.requires_grad for parameter in model.parameters()) and not model.training
    separate = resolve(str(write_checkpoint(tmp_path / "separate", tied=False)))
    assert not separate.config.tie_word_embeddings


def test_a_tied_head_stored_twice_is_accepted(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model")
    tensors(lambda loaded: loaded.update({"lm_head.weight": loaded["model.embed_tokens.weight"].clone()}))(folder)
    assert resolve(str(folder)).config.tie_word_embeddings


def test_links_inside_a_hub_cache_are_fine(tmp_path: Path) -> None:
    cache = tmp_path / "models--a--b"
    snapshot = write_checkpoint(cache / "snapshots" / ("0" * 40))
    (cache / "blobs").mkdir()
    for path in list(snapshot.iterdir()):
        path.rename(cache / "blobs" / path.name)
        path.symlink_to(Path("../../blobs") / path.name)
    assert resolve(str(snapshot)).eos_token_ids == [257, 258]


def test_half_precision_overflow_is_named(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model")
    poison(1e6)(folder)
    checkpoint = resolve(str(folder))
    with pytest.raises(InvalidWeights, match="bf16"):
        checkpoint.load_model(torch.float16)


def test_end_ids_come_from_every_source(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model")
    assert resolve(str(folder)).eos_token_ids == [257, 258], "the end of a turn comes from the chat template"
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 6]}))
    assert resolve(str(folder)).eos_token_ids == [5, 6, 257, 258]


def test_the_saved_tokenizer_needs_only_the_tokenizers_library(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    resolve(str(write_checkpoint(tmp_path / "model"))).save_tokenizer(tmp_path / "tokenizer")
    saved = Tokenizer.from_file(str(tmp_path / "tokenizer" / "tokenizer.json"))
    for text in ("a\n\n123", "<|begin|>é🙂<|turn|>"):
        assert saved.encode(text).ids == byte_tokenizer().encode(text).ids
    settings = json.loads((tmp_path / "tokenizer" / "tokenizer_config.json").read_text())
    assert settings["eos_token"] == "<|end|>"
    assert "<|turn|>" in (tmp_path / "tokenizer" / "chat_template.jinja").read_text()
