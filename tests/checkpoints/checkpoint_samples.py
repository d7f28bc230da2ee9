"""A small valid checkpoint to damage: two llama layers with random weights and a byte-level tokenizer."""

from __future__ import annotations

import json
import shutil
import struct
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from dspark_runtime.errors import DsparkError

SPECIAL = ("<|begin|>", "<|end|>", "<|turn|>")
VOCAB = 320
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '<|turn|>' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def byte_tokenizer() -> Tokenizer:
    """One token per byte, then the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: index for index, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return tokenizer


def config(**changes: Any) -> LlamaConfig:
    """Config of the sample."""
    values: dict[str, Any] = {
        **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
        **{"num_key_value_heads": 2, "vocab_size": VOCAB, "max_position_embeddings": 128, "tie_word_embeddings": True},
        **{"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": None},
    }
    return LlamaConfig(**(values | changes))


@cache
def _original(tied: bool) -> Path:
    folder = Path(mkdtemp(prefix="dspark-sample-"))
    torch.manual_seed(0)
    LlamaForCausalLM(config(tie_word_embeddings=tied)).save_pretrained(folder)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": SPECIAL[0], "eos_token": SPECIAL[1]})
    )
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return folder


def write_checkpoint(folder: Path, tied: bool = True) -> Path:
    """A fresh copy of the sample checkpoint at ``folder``."""
    shutil.copytree(_original(tied), folder)
    return folder


def edit_config(folder: Path, **changes: Any) -> None:
    """Set keys of config.json; ``...`` removes one."""
    path = folder / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


def read_safetensors(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and payload of a safetensors file, as they are."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_safetensors(path: Path, header: dict[str, Any] | str, payload: bytes) -> None:
    """Write any header with any payload, valid or not."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + payload)


def refusal(model: str, out: Path, **options: Any) -> DsparkError:
    """The error a build of ``model`` ends with; checks that it left nothing at or beside ``out``."""
    from dspark_export.build.options import BuildOptions
    from dspark_export.build.pipeline import build

    out.parent.mkdir(exist_ok=True)
    before = sorted(out.parent.iterdir())
    try:
        build(BuildOptions(model=model, out=out, **options))
    except DsparkError as error:
        assert sorted(out.parent.iterdir()) == before, "a refused build left files behind"
        return error
    raise AssertionError(f"{model} was built")
