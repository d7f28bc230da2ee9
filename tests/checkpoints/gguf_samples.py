"""GGUF files for tests: the sample checkpoint with llama.cpp's names and weight order, and small vocabularies."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, dequantize, quants
from safetensors.numpy import load_file

from tests.checkpoints.checkpoint_samples import CHAT_TEMPLATE, SPECIAL, VOCAB, byte_tokenizer, config, write_checkpoint

NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}


def gguf_name(name: str) -> str:
    """llama.cpp's name of a llama weight."""
    if name in NAMES:
        return NAMES[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{NAMES[rest]}"


def rotated_halves_interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp pairs neighbouring rotary dimensions where transformers pairs the halves of a head."""
    rows, width = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, width).swapaxes(1, 2).reshape(rows, width)


def sample_tensors(folder: Path) -> dict[str, np.ndarray]:
    """The sample checkpoint's weights as llama.cpp stores them."""
    settings, tensors = config(), {}
    for name, weight in load_file(write_checkpoint(folder) / "model.safetensors").items():
        if "q_proj" in name:
            weight = rotated_halves_interleaved(weight, settings.num_attention_heads)
        if "k_proj" in name:
            weight = rotated_halves_interleaved(weight, settings.num_key_value_heads)
        tensors[gguf_name(name)] = np.ascontiguousarray(weight, dtype=np.float32)
    return tensors


def byte_vocabulary() -> dict[str, Any]:
    """Tokenizer fields of the sample checkpoint: bytes, one merge, special tokens, unused rows up to the embedding."""
    vocabulary = byte_tokenizer().get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    tokens += [f"[UNUSED{index}]" for index in range(VOCAB - len(tokens) - 1)] + ["ab"]
    kinds = {**dict.fromkeys(SPECIAL, 3), **{token: 5 for token in tokens if token.startswith("[UNUSED")}}
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [kinds.get(token, 1) for token in tokens],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": 256,
        "tokenizer.ggml.eos_token_id": 257,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }


def metadata() -> dict[str, Any]:
    """The sample checkpoint's config as llama.cpp writes it."""
    settings = config()
    return {
        "llama.block_count": settings.num_hidden_layers,
        "llama.context_length": settings.max_position_embeddings,
        "llama.embedding_length": settings.hidden_size,
        "llama.feed_forward_length": settings.intermediate_size,
        "llama.attention.head_count": settings.num_attention_heads,
        "llama.attention.head_count_kv": settings.num_key_value_heads,
        "llama.attention.layer_norm_rms_epsilon": float(settings.rms_norm_eps),
        "llama.rope.freq_base": 10000.0,
        "llama.rope.dimension_count": settings.head_dim,
        "llama.vocab_size": VOCAB,
    }


def encoded(weight: np.ndarray, kind: GGMLQuantizationType, rng: np.random.Generator) -> np.ndarray:
    """``weight`` as the type stores it; for types that only llama.cpp writes, random blocks of small numbers."""
    try:
        return quants.quantize(weight, kind)
    except NotImplementedError:
        pass
    values, octets = GGML_QUANT_SIZES[kind]
    pool = np.zeros((0, octets), np.uint8)
    while len(pool) < 64:
        drawn = rng.integers(0, 256, (4096, octets), np.uint8)
        with np.errstate(all="ignore"):
            largest = np.abs(dequantize(drawn, kind).reshape(len(drawn), values)).max(1)
        pool = np.concatenate([pool, drawn[(largest < 0.3) & (largest > 1e-3)]])  # NaN is neither
    return pool[rng.integers(0, len(pool), weight.size // values)].reshape(weight.shape[0], -1)


def write_gguf(
    path: Path,
    fields: dict[str, Any],
    tensors: dict[str, np.ndarray],
    architecture: str = "llama",
    kinds: Mapping[str, GGMLQuantizationType] | None = None,
) -> Path:
    """Write a GGUF file; fields set to None are left out. ``kinds``: types of tensors that are bytes already."""
    writer = GGUFWriter(path, architecture)
    for key, value in fields.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_array(key, value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor, raw_dtype=(kinds or {}).get(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
