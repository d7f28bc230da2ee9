"""Writes small random drafts in every format, as the public training codes store them.

Every writer returns the folder, all tensors under DeepSpec's names (the normal form) and the drafts' target ids.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests import tiny_models
from tests.drafts.tensors import Sizes, block_tensors, draft_ids, eagle_tensors, maps, random_tables

TARGET_TOKENS = 384
"""Tokens of the tokenizer of :func:`write_target`; its model has more rows, the last is the mask."""


@dataclass(frozen=True)
class Written:
    """A draft on disk. ``target_ids``: int64 [draft vocab] for a reduced vocabulary."""

    folder: Path
    tensors: dict[str, torch.Tensor]
    target_ids: torch.Tensor | None = None


def write_target(folder: Path, sizes: Sizes | None = None, *, arch: str = "qwen3", **overrides: Any) -> Path:
    """A whole target: 8 layers, 400 rows of embedding for a tokenizer of 384."""
    sizes = sizes or Sizes()
    settings = {
        "vocab_size": sizes.vocab,
        "hidden_size": sizes.hidden,
        "num_hidden_layers": sizes.target_layers,
        "tie_word_embeddings": False,
        **({"max_window_layers": sizes.target_layers, "head_dim": sizes.head_dim} if arch == "qwen3" else {}),
    }
    _, model = tiny_models.make(arch, **{**settings, **overrides})
    model.save_pretrained(folder)
    tiny_models.tokenizer(TARGET_TOKENS).save_pretrained(folder)
    return folder


def target_tables(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Embedding and head of a target written by :func:`write_target`."""
    from safetensors.torch import load_file

    tensors = load_file(folder / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    return embedding, tensors.get("lm_head.weight", embedding)


def write_deepspec(
    folder: Path,
    kind: str = "dspark",
    family: str = "qwen3",
    markov: str = "vanilla",
    *,
    sizes: Sizes | None = None,
    confidence: bool = True,
    with_markov: bool = True,
    bias: bool = False,
    k_eq_v: bool = True,
    tables: tuple[torch.Tensor, torch.Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **changes: Any,
) -> Written:
    """DeepSpec: ``kind`` dspark, dflash (no heads) or eagle3; ``tables`` are the target's embedding and head.

    ``changes`` set fields of config.json, ``...`` removes one.
    """
    sizes = sizes or Sizes()
    gemma, eagle = family == "gemma4", kind == "eagle3"
    if kind != "dspark":
        markov, confidence = "none", False
    if eagle and sizes.taps == Sizes.taps:
        sizes = Sizes(**{**sizes.__dict__, "taps": (0, 1, 3, 5, 6)})
    config = {
        **_common(sizes, 1 if eagle else sizes.layers, bias=bias),
        "architectures": [("Gemma4" if gemma else "Qwen3") + ("Eagle3Model" if eagle else "DSparkModel")],
        "model_type": "gemma4_text" if gemma else "qwen3",
        "num_target_layers": sizes.target_layers,
        "target_layer_ids": list(sizes.taps),
        "tie_word_embeddings": False,
    }
    if gemma:
        del config["hidden_act"]
        config |= {
            "hidden_activation": "gelu_pytorch_tanh",
            "head_dim": 8,
            "global_head_dim": sizes.head_dim,
            "num_key_value_heads": 4 if k_eq_v else sizes.kv_heads,
            "num_global_key_value_heads": sizes.kv_heads,
            "attention_k_eq_v": k_eq_v,
            "final_logit_softcapping": 30.0,
            "enable_moe_block": False,
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": sizes.vocab,
            "num_kv_shared_layers": 0,
            "use_double_wide_mlp": False,
            "sliding_window": 512,
            "target_model_type": "gemma4",
            "target_text_model_type": "gemma4_text",
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "full_attention": {
                    "rope_type": "proportional",
                    "partial_rotary_factor": 0.25,
                    "rope_theta": sizes.theta,
                },
            },
        }
    if eagle:
        config |= {
            "ttt_length": 7,
            "step_loss_decay": 0.8,
            "draft_num_hidden_layers": 1,
            "target_model_name_or_path": "target",
        }
        tensors = eagle_tensors(sizes, family=family, qk_norm=True, bias=bias, k_eq_v=gemma and k_eq_v, seed=seed)
    else:
        config |= {
            "block_size": sizes.block,
            "mask_token_id": sizes.mask,
            "num_anchors": 512,
            "markov_rank": 0 if markov == "none" else sizes.rank,
            "enable_confidence_head": confidence,
        }
        with_markov = with_markov and markov != "none"
        config |= {} if markov == "none" else {"markov_head_type": markov}
        config |= {"confidence_head_with_markov": with_markov} if confidence else {}
        tensors = block_tensors(
            sizes,
            family=family,
            markov=markov,
            confidence=confidence,
            with_markov=with_markov,
            bias=bias,
            k_eq_v=gemma and k_eq_v,
            seed=seed,
        )
    embedding, head = tables or random_tables(sizes, seed)
    tensors |= {"embed_tokens.weight": embedding.clone(), "lm_head.weight": head.clone()}
    return _save(folder, config | changes, tensors, dtype, tensors)


def write_zlab(
    folder: Path,
    *,
    sizes: Sizes | None = None,
    nested_block: bool = False,
    taps: bool = True,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **changes: Any,
) -> Written:
    """z-lab's DFlash: layers and norms only. ``nested_block``: block size inside dflash_config, as newer ones have."""
    sizes = sizes or Sizes()
    inner: dict[str, Any] = {"mask_token_id": sizes.mask}
    inner |= {"target_layer_ids": list(sizes.taps)} if taps else {}
    inner |= {"block_size": sizes.block} if nested_block else {}
    config = {
        **_common(sizes, sizes.layers, old_rope=True),
        "architectures": ["DFlashDraftModel"],
        "auto_map": {"AutoModel": "dflash.DFlashDraftModel"},
        "model_type": "qwen3",
        "num_target_layers": sizes.target_layers,
        "dflash_config": inner,
        "tie_word_embeddings": True,
    }
    config |= {} if nested_block else {"block_size": sizes.block}
    tensors = block_tensors(sizes, seed=seed)
    return _save(folder, config | changes, tensors, dtype, tensors)


def write_specforge(
    folder: Path,
    *,
    sizes: Sizes | None = None,
    confidence: bool = True,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **changes: Any,
) -> Written:
    """A DSpark export of SpecForge: everything of it inside dflash_config, the anchor's row predicts nothing."""
    sizes = sizes or Sizes()
    config = {
        **_common(sizes, sizes.layers, old_rope=True),
        "architectures": ["DSparkDraftModel"],
        "auto_map": {"AutoModel": "dspark.DSparkDraftModel"},
        "model_type": "qwen3",
        "num_target_layers": sizes.target_layers,
        "block_size": sizes.block,
        "dflash_config": {
            "mask_token_id": sizes.mask,
            "target_layer_ids": list(sizes.taps),
            "projector_type": "dspark",
            "markov_rank": sizes.rank,
            "markov_head_type": "vanilla",
            "confidence_head_alpha": 1.0,
            "enable_confidence_head": confidence,
            "confidence_head_with_markov": True,
        },
        "tie_word_embeddings": False,
    }
    tensors = block_tensors(sizes, markov="vanilla", confidence=confidence, seed=seed)
    return _save(folder, config | changes, tensors, dtype, tensors)


def write_speculators(
    folder: Path,
    kind: str = "dspark",
    *,
    sizes: Sizes | None = None,
    draft_vocab: int | None = None,
    markov: str = "vanilla",
    window: int | None = None,
    non_causal: bool = False,
    norm_before_residual: bool = True,
    qk_norm: bool = False,
    tables: tuple[torch.Tensor, torch.Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **changes: Any,
) -> Written:
    """vLLM's speculators: dspark, dflash or eagle3; tap ids count the embedding as 0, d2t holds offsets.

    A draft with ``draft_vocab`` stores its head; others only if ``tables`` are given. ``window``: the first layer of a
    block draft slides.
    """
    sizes = sizes or Sizes()
    eagle = kind == "eagle3"
    layers = 1 if eagle else sizes.layers
    inner = {
        **_common(sizes, layers),
        "model_type": "llama" if eagle and not qk_norm else "qwen3",
        "tie_word_embeddings": False,
    }
    if window is not None:
        inner |= {
            "layer_types": ["sliding_attention"] + ["full_attention"] * (layers - 1),
            "sliding_window": window,
            "use_sliding_window": True,
        }
    config: dict[str, Any] = {
        "architectures": [{"dspark": "DSpark", "dflash": "DFlash", "eagle3": "Eagle3"}[kind] + "Speculator"],
        "speculators_model_type": kind,
        "speculators_version": "0.5.0",
        "transformer_layer_config": inner,
        "draft_vocab_size": draft_vocab or sizes.vocab,
        "target_hidden_size": None,
        "tie_word_embeddings": False,
        "dtype": "float32",
        "transformers_version": "5.0.0",
    }
    shifted = [tap + 1 for tap in sizes.taps]
    if eagle:
        drafts = 3
        config |= {
            "eagle_aux_hidden_state_layer_ids": shifted,
            "norm_before_residual": norm_before_residual,
            "norm_before_fc": False,
            "embed_requires_grad": False,
        }
        tensors = eagle_tensors(sizes, qk_norm=qk_norm, seed=seed)
    else:
        drafts = sizes.block if kind == "dspark" else sizes.block - 1
        config |= {
            "aux_hidden_state_layer_ids": shifted,
            "block_size": sizes.block,
            "mask_token_id": sizes.mask,
            "sliding_window_non_causal": non_causal,
            "max_anchors": 256,
        }
        if kind == "dspark":
            config |= {
                "markov_rank": 0 if markov == "none" else sizes.rank,
                "markov_head_type": "vanilla" if markov == "none" else markov,
                "enable_confidence_head": True,
                "confidence_head_with_markov": markov != "none",
            }
        dspark = kind == "dspark"
        tensors = block_tensors(
            sizes,
            markov=markov if dspark else "none",
            confidence=dspark,
            with_markov=markov != "none",
            draft_vocab=draft_vocab,
            seed=seed,
        )
    config["speculators_config"] = {
        "algorithm": kind,
        "default_proposal_method": "greedy",
        "proposal_methods": [
            {"proposal_type": "greedy", "speculative_tokens": drafts, "accept_tolerance": 0.0, "verifier_accept_k": 1}
        ],
        "verifier": {"name_or_path": "target", "architectures": ["Qwen3ForCausalLM"]},
    }
    ids = None if draft_vocab is None else draft_ids(sizes, draft_vocab)
    embedding, head = tables or random_tables(sizes, seed)
    if ids is not None or eagle or tables is not None:
        tensors["lm_head.weight"] = (head if ids is None else head[ids]).clone()
    if tables is not None:
        tensors["embed_tokens.weight"] = embedding.clone()
    stored = tensors | ({} if ids is None else maps(ids, sizes.vocab))
    return _save(folder, config | changes, stored, dtype, tensors, ids)


def write_classic_eagle3(
    folder: Path,
    *,
    sizes: Sizes | None = None,
    draft_vocab: int = 96,
    pickled: bool = False,
    fc_bias: bool = False,
    tables: tuple[torch.Tensor, torch.Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **changes: Any,
) -> Written:
    """EAGLE-3 as its authors and SpecForge store it: one ``midlayer``, its own head, d2t and t2d, no tap ids."""
    sizes = sizes or Sizes()
    config = {
        **_common(sizes, 1, old_rope=True),
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "draft_vocab_size": draft_vocab,
        "tie_word_embeddings": False,
        "pretraining_tp": 1,
    }
    ids = draft_ids(sizes, draft_vocab)
    tensors = eagle_tensors(sizes, fc_bias=fc_bias, seed=seed)
    tensors["lm_head.weight"] = random_tables(sizes, seed + 1)[1][:draft_vocab].clone()
    if tables is not None:
        tensors["embed_tokens.weight"] = tables[0].clone()
    stored = {name.replace("layers.0.", "midlayer."): tensor for name, tensor in tensors.items()}
    stored |= maps(ids, sizes.vocab)
    return _save(folder, config | changes, stored, dtype, tensors, ids, pickled=pickled)


# Files


def _common(s: Sizes, layers: int, *, bias: bool = False, old_rope: bool = False) -> dict[str, Any]:
    rope = {"rope_theta": s.theta, "rope_type": "default"}
    return {
        "attention_bias": bias,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "head_dim": s.head_dim,
        "hidden_act": "silu",
        "hidden_size": s.hidden,
        "initializer_range": 0.02,
        "intermediate_size": s.inner,
        "layer_types": ["full_attention"] * layers,
        "max_position_embeddings": s.positions,
        "num_attention_heads": s.heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": s.kv_heads,
        "rms_norm_eps": 1e-6,
        "transformers_version": "5.0.0",
        "use_cache": True,
        "vocab_size": s.vocab,
        **({"rope_theta": s.theta, "rope_scaling": None} if old_rope else {"rope_parameters": rope}),
    }


def _save(
    folder: Path,
    config: Mapping[str, Any],
    stored: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
    tensors: dict[str, torch.Tensor],
    ids: torch.Tensor | None = None,
    *,
    pickled: bool = False,
) -> Written:
    folder.mkdir(parents=True, exist_ok=True)
    values = {key: value for key, value in config.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(values, indent=2))
    kept = {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in stored.items()}
    if pickled:
        torch.save(kept, folder / "pytorch_model.bin")
    else:
        save_file({key: tensor.contiguous() for key, tensor in kept.items()}, folder / "model.safetensors")
    return Written(folder, {key: tensor.to(dtype) for key, tensor in tensors.items()}, ids)
