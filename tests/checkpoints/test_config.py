"""config.json: every way it can be wrong ends as a typed error before any work, and nothing is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dspark_runtime.errors import (
    CheckpointError,
    InvalidConfig,
    ModelNotFound,
    UnsupportedArchitecture,
    UntrustedCheckpoint,
    UsageError,
)
from tests.checkpoints.checkpoint_samples import edit_config, refusal, write_checkpoint


def text(content: str | bytes) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / "config.json").write_bytes(content.encode() if isinstance(content, str) else content)

    return damage


def keys(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_config(folder, **changes)


def nan(key: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        values = json.loads((folder / "config.json").read_text()) | {key: float("nan")}
        (folder / "config.json").write_text(json.dumps(values))

    return damage


def generation(content: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / "generation_config.json").write_text(content)

    return damage


def remove(folder: Path) -> None:
    (folder / "config.json").unlink()


def only_gguf(folder: Path) -> None:
    remove(folder)
    (folder / "model.Q4.gguf").write_bytes(b"GGUF")


def pipe(folder: Path) -> None:
    import os

    remove(folder)
    os.mkfifo(folder / "config.json")


CASES = {
    "no config": (remove, ModelNotFound, "no config.json"),
    "only a gguf file": (only_gguf, ModelNotFound, "model.Q4.gguf"),
    "a pipe": (pipe, InvalidConfig, "pipe"),
    "empty": (text(""), InvalidConfig, "not valid JSON"),
    "cut": (text('{"model_type": "llama"'), InvalidConfig, "not valid JSON"),
    "not utf-8": (text(b"\xff\xfe{}"), InvalidConfig, "not valid JSON"),
    "a list": (text("[]"), InvalidConfig, "expected an object"),
    "a number": (text("1"), InvalidConfig, "expected an object"),
    "100 MB": (text(b'{"a": "' + b"x" * 100_000_000 + b'"}'), InvalidConfig, "bytes"),
    "nested 100000 deep": (text('{"a":' * 100_000 + "1" + "}" * 100_000), InvalidConfig, "nested"),
    "nested 40 deep": (text('{"a":' * 40 + "1" + "}" * 40), InvalidConfig, "nested"),
    "no model_type": (keys(model_type=...), InvalidConfig, "no model_type"),
    "model_type a number": (keys(model_type=3), InvalidConfig, "no model_type"),
    "unknown model_type": (keys(model_type="lama"), UnsupportedArchitecture, "lama"),
    "an encoder": (keys(model_type="bert"), UnsupportedArchitecture, "bert"),
    "remote code": (keys(model_type="mine", auto_map={"AutoConfig": "m.C"}), UntrustedCheckpoint, "m.C"),
    "quantized by a method that is not read": (
        keys(quantization_config={"quant_method": "aqlm"}),
        UnsupportedArchitecture,
        "aqlm",
    ),
    "not quantized as it says": (keys(quantization_config={"quant_method": "awq"}), CheckpointError, "plain floats"),
    "hidden_size negative": (keys(hidden_size=-32), InvalidConfig, "hidden_size"),
    "hidden_size zero": (keys(hidden_size=0), InvalidConfig, "hidden_size"),
    "hidden_size NaN": (nan("hidden_size"), InvalidConfig, "NaN"),
    "hidden_size infinite": (text('{"model_type": "llama", "hidden_size": Infinity}'), InvalidConfig, "Infinity"),
    "hidden_size a bool": (keys(hidden_size=True), InvalidConfig, "hidden_size"),
    "hidden_size a fraction": (keys(hidden_size=32.5), InvalidConfig, "hidden_size"),
    "hidden_size text": (keys(hidden_size="32"), InvalidConfig, "hidden_size"),
    "hidden_size null": (keys(hidden_size=None), InvalidConfig, "hidden_size"),
    "hidden_size huge": (keys(hidden_size=10**30), InvalidConfig, "hidden_size"),
    "a million layers": (keys(num_hidden_layers=10**6), InvalidConfig, "num_hidden_layers"),
    "vocab_size zero": (keys(vocab_size=0), InvalidConfig, "vocab_size"),
    "positions zero": (keys(max_position_embeddings=0), InvalidConfig, "max_position_embeddings"),
    "head_dim a bool": (keys(head_dim=True), InvalidConfig, "head_dim"),
    "heads and kv heads": (keys(num_key_value_heads=3), InvalidConfig, "multiple of num_key_value_heads"),
    "kv heads zero": (keys(num_key_value_heads=0), InvalidConfig, "num_key_value_heads"),
    "hidden and heads": (
        keys(num_attention_heads=5, num_key_value_heads=5, head_dim=...),
        InvalidConfig,
        "no head_dim",
    ),
    "eps negative": (keys(rms_norm_eps=-1e-5), InvalidConfig, "rms_norm_eps"),
    "eps text": (keys(rms_norm_eps="small"), InvalidConfig, "rms_norm_eps"),
    "theta a bool": (keys(rope_theta=True), InvalidConfig, "rope_theta"),
    "unknown rope": (keys(rope_parameters={"rope_type": "spiral", "rope_theta": 1e4}), InvalidConfig, "spiral"),
    "unknown old rope": (keys(rope_scaling={"type": "spiral", "factor": 2.0}), InvalidConfig, "spiral"),
    "rope a list": (keys(rope_scaling=[2.0]), InvalidConfig, "rope_scaling"),
    "rope factor zero": (keys(rope_scaling={"rope_type": "linear", "factor": 0}), InvalidConfig, "factor"),
    "rope factor text": (keys(rope_scaling={"rope_type": "linear", "factor": "2"}), InvalidConfig, "factor"),
    "tie text": (keys(tie_word_embeddings="yes"), InvalidConfig, "tie_word_embeddings"),
    "tie in two places": (
        keys(tie_word_embeddings=True, text_config={"tie_word_embeddings": False}),
        InvalidConfig,
        "true and false",
    ),
    "eos out of range": (keys(eos_token_id=320), InvalidConfig, "eos_token_id"),
    "eos a bool": (keys(eos_token_id=True), InvalidConfig, "eos_token_id"),
    "one eos out of range": (keys(eos_token_id=[1, 9999]), InvalidConfig, "9999"),
    "generation config a list": (generation("[]"), InvalidConfig, "expected an object"),
    "generation config cut": (generation("{"), InvalidConfig, "not valid JSON"),
    "generation eos out of range": (generation('{"eos_token_id": [1, 400]}'), InvalidConfig, "400"),
    "layer_types too short": (keys(layer_types=["full_attention"]), InvalidConfig, "layer_types"),
    "activation": (keys(hidden_act="wobble"), CheckpointError, "wobble"),
}


@pytest.mark.parametrize("case", CASES)
def test_refused(case: str, tmp_path: Path) -> None:
    damage, error, says = CASES[case]
    folder = write_checkpoint(tmp_path / "model")
    damage(folder)
    caught = refusal(str(folder), tmp_path / "out" / "bundle")
    assert isinstance(caught, error), repr(caught)
    assert says in str(caught)


def test_revision_of_a_local_folder(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model")
    assert isinstance(refusal(str(folder), tmp_path / "out" / "bundle", revision="main"), UsageError)


@pytest.mark.parametrize(
    "name", ["./no-such-model", "/no/such/model", "~/no-such-model", "no-such.gguf", "a b", "a/b/c", ""]
)
def test_no_such_path(name: str, tmp_path: Path) -> None:
    caught = refusal(name, tmp_path / "out" / "bundle")
    assert type(caught) is ModelNotFound
    assert "hub id" in str(caught)


def test_a_file_that_is_no_gguf(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    assert type(refusal(str(tmp_path / "notes.txt"), tmp_path / "out" / "bundle")) is ModelNotFound
