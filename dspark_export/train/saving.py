"""A trained drafter on disk: DeepSpec's checkpoint format, plus what that format has no place for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dspark_export.drafts.extras import CALIBRATION, VOCABULARY, stored_vocabulary
from dspark_export.train.module import DraftGeometry, TrainableDrafter
from dspark_runtime.errors import UsageError

_BIAS = "confidence_head.proj.bias"


def save_drafter(
    folder: Path,
    model: TrainableDrafter,
    *,
    target_layers: int,
    calibration: Mapping[str, Any] | None = None,
    confidence_shift: float = 0.0,
) -> None:
    """Write config, bfloat16 weights without the target's embedding and head, vocabulary map and calibration.

    ``confidence_shift`` is added to the bias of the confidence head.
    """
    folder.mkdir(parents=True, exist_ok=True)
    g = model.geometry
    (folder / "config.json").write_text(json.dumps(draft_config(g, target_layers), indent=2) + "\n", "utf-8")
    wide = {name: p.detach() for name, p in model.named_parameters()}
    if _BIAS in wide:
        wide[_BIAS] = wide[_BIAS] + confidence_shift
    tensors = {name: tensor.to(torch.bfloat16).cpu().contiguous() for name, tensor in wide.items()}
    ids = model.draft_ids.cpu()
    if "markov_head.markov_w2.weight" in tensors:  # rows of tokens it never drafts were never trained
        trained = torch.zeros_like(tensors["markov_head.markov_w2.weight"])
        trained[ids] = tensors["markov_head.markov_w2.weight"][ids]
        tensors["markov_head.markov_w2.weight"] = trained
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    if len(ids) < g.vocab - 1:
        members = torch.zeros(g.vocab, dtype=torch.bool)
        members[ids] = True
        save_file({"d2t": ids - torch.arange(len(ids)), "t2d": members}, folder / VOCABULARY)
    if calibration is not None:
        (folder / CALIBRATION).write_text(json.dumps(calibration, indent=2) + "\n", "utf-8")


def draft_config(g: DraftGeometry, target_layers: int) -> dict[str, Any]:
    """DeepSpec's config.json of a drafter of geometry ``g``."""
    config: dict[str, Any] = {
        "architectures": ["Qwen3DSparkModel"],
        "model_type": "qwen3",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "head_dim": g.head_dim,
        "hidden_act": "silu",
        "hidden_size": g.hidden,
        "initializer_range": 0.02,
        "intermediate_size": g.intermediate,
        "layer_types": ["full_attention"] * g.layers,
        "max_position_embeddings": g.positions,
        "num_attention_heads": g.heads,
        "num_hidden_layers": g.layers,
        "num_key_value_heads": g.kv_heads,
        "rms_norm_eps": g.epsilon,
        "rope_parameters": dict(g.rope),
        "tie_word_embeddings": False,
        "vocab_size": g.vocab,
        "num_target_layers": target_layers,
        "target_layer_ids": list(g.taps),
        "block_size": g.block,
        "mask_token_id": g.mask_token,
        "num_anchors": 512,
        "markov_rank": g.rank if g.markov != "none" else 0,
        "enable_confidence_head": g.confidence,
    }
    if g.markov != "none":
        config["markov_head_type"] = g.markov
    if g.confidence:
        config["confidence_head_with_markov"] = g.markov != "none"
    return config


def load_drafter(folder: Path, embedding: torch.Tensor, head: torch.Tensor) -> TrainableDrafter:
    """A drafter that :func:`save_drafter` wrote, over the target's ``embedding`` and ``head``, both [vocab, hidden].

    Raises InvalidVocabMap for a damaged vocabulary map; the rest is what ``build --draft`` checks.
    """
    config = json.loads((folder / "config.json").read_text("utf-8"))
    rank, rope = config["markov_rank"], config["rope_parameters"]
    geometry = DraftGeometry(
        hidden=config["hidden_size"],
        intermediate=config["intermediate_size"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        vocab=config["vocab_size"],
        layers=config["num_hidden_layers"],
        block=config["block_size"],
        taps=tuple(config["target_layer_ids"]),
        mask_token=config["mask_token_id"],
        markov=config["markov_head_type"] if rank else "none",
        rank=rank,
        confidence=config["enable_confidence_head"],
        theta=float(rope["rope_theta"]),
        rope=rope,
        positions=config["max_position_embeddings"],
        epsilon=config["rms_norm_eps"],
    )
    model = TrainableDrafter(geometry, embedding, head, stored_vocabulary(folder, geometry.vocab))
    model.load_state_dict({name: t.float() for name, t in load_file(folder / "model.safetensors").items()})
    return model


def load_drafter_like(
    folder: Path, geometry: DraftGeometry, embedding: torch.Tensor, head: torch.Tensor
) -> TrainableDrafter:
    """A drafter that :func:`save_drafter` wrote, to be trained further as one of ``geometry``.

    Raises:
        UsageError: it is not such a drafter, or has another shape.
        InvalidVocabMap: its vocabulary map is damaged.
    """
    try:
        model = load_drafter(folder, embedding, head)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UsageError(f"--init {folder} is not a drafter train-drafter wrote for this model ({error})") from error
    found, wanted = (vars(g) | {"rope": None} for g in (model.geometry, geometry))
    if wrong := [f"{name} {found[name]} instead of {wanted[name]}" for name in found if found[name] != wanted[name]]:
        raise UsageError(f"--init {folder} has another shape ({', '.join(wrong)}): ask for its own")
    return model
