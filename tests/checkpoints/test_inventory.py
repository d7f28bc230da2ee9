"""Every stored tensor becomes part of the model, stays unread for a known reason, or is an error that names it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dspark_export.checkpoints import Trust, resolve
from dspark_export.checkpoints.inventory import harmless_tensors
from dspark_runtime.errors import InvalidWeights
from tests import tiny_models
from tests.checkpoints.checkpoint_samples import edit_config, refusal, write_checkpoint
from tests.checkpoints.test_weights import FILE, shards, write_index

Damage = Callable[[Path], None]


def checkpoint(arch: str, **settings: Any) -> Callable[[Path], Path]:
    return lambda folder: tiny_models.save_checkpoint(arch, folder, **settings)


def config(**changes: Any) -> Damage:
    return lambda folder: edit_config(folder, **changes)


def more(**tensors: torch.Tensor) -> Damage:
    """Store further tensors; ``__`` in a name stands for a dot."""

    def change(folder: Path) -> None:
        stored = load_file(folder / FILE) | {name.replace("__", "."): tensor for name, tensor in tensors.items()}
        save_file(stored, folder / FILE, {"format": "pt"})

    return change


def single_beside_shards(folder: Path) -> None:
    whole = (folder / FILE).read_bytes()
    shards(folder)
    (folder / FILE).write_bytes(whole)


def unmerged_adapter(folder: Path) -> None:
    stored = load_file(folder / FILE)
    weight = stored.pop("model.layers.0.self_attn.q_proj.weight")
    stored["model.layers.0.self_attn.q_proj.base_layer.weight"] = weight
    stored["model.layers.0.self_attn.q_proj.lora_A.default.weight"] = torch.zeros(8, weight.shape[1])
    save_file(stored, folder / FILE, {"format": "pt"})


BIASES = checkpoint("llama", attention_bias=True, mlp_bias=True)
MTP = {"mtp__layers__0__self_attn__q_proj__weight": torch.ones(4, 4)}
EXTRA_LAYER = {
    "model__layers__2__eh_proj__weight": torch.ones(4, 8),
    "model__layers__2__enorm__weight": torch.ones(4),
    "model__layers__2__self_attn__q_proj__weight": torch.ones(4, 4),
}

REFUSED: dict[str, tuple[Callable[[Path], Path], Damage, str]] = {
    "biases switched off": (BIASES, config(attention_bias=False, mlp_bias=False), "switches these biases off"),
    "attention biases switched off": (BIASES, config(attention_bias=False), r"self_attn\.\w+\.bias"),
    "norms of another type": (
        checkpoint("qwen3"),
        config(model_type="llama", architectures=["LlamaForCausalLM"]),
        r"q_norm.*right model_type",
    ),
    "more layers": (checkpoint("qwen2", num_hidden_layers=3), config(num_hidden_layers=2, layer_types=...), "2 layers"),
    "more experts": (checkpoint("mixtral"), config(num_local_experts=3), "shape|experts"),
    "a layer beyond the last that predicts nothing": (
        write_checkpoint,
        more(model__layers__2__self_attn__q_proj__weight=torch.ones(32, 32)),
        r"model\.layers\.2\.self_attn",
    ),
    "a weight nobody knows": (write_checkpoint, more(model__gate__weight=torch.ones(4)), r"model\.gate\.weight"),
    "a bias that is not a mask": (write_checkpoint, more(model__attn__bias=torch.ones(7)), r"model\.attn\.bias"),
    "one weight under two names": (write_checkpoint, more(norm__weight=torch.ones(32)), "twice"),
    "an adapter that is not merged": (write_checkpoint, unmerged_adapter, "merge_and_unload"),
    "an adapter beside the weights": (
        write_checkpoint,
        lambda folder: (folder / "adapter_config.json").write_text("{}") and None,
        "adapter beside its weights",
    ),
    "a single file beside shards": (write_checkpoint, single_beside_shards, "may be two models"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_tensors_nobody_takes_are_refused(case: str, tmp_path: Path) -> None:
    make, damage, says = REFUSED[case]
    folder = make(tmp_path / "model")
    damage(folder)
    with pytest.raises(InvalidWeights, match=says):
        resolve(str(folder))


HARMLESS: dict[str, tuple[Damage, str, str]] = {
    "prediction layers": (more(**MTP), "mtp.layers.*.self_attn.q_proj.weight", "multi-token prediction"),
    "prediction layers in FP8": (
        more(**{name: tensor.to(torch.float8_e4m3fn) for name, tensor in MTP.items()}),
        "mtp.layers.*.self_attn.q_proj.weight",
        "multi-token prediction",
    ),
    "a prediction layer after the last": (
        more(**EXTRA_LAYER),
        "model.layers.*.self_attn.q_proj.weight",
        "multi-token prediction",
    ),
    "rotary frequencies": (
        more(model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4)),
        "model.layers.*.self_attn.rotary_emb.inv_freq",
        "follow from the config",
    ),
    "a vision tower": (more(vision_tower__patch__weight=torch.ones(4, 4)), "vision_tower.patch.weight", "text only"),
    "scales of a quantized cache": (
        more(model__layers__0__self_attn__k_proj__k_scale=torch.ones(1)),
        "model.layers.*.self_attn.k_proj.k_scale",
        "cache",
    ),
}


@pytest.mark.parametrize("case", HARMLESS)
def test_harmless_tensors_are_told_of(case: str, tmp_path: Path) -> None:
    damage, name, reason = HARMLESS[case]
    plain = resolve(str(write_checkpoint(tmp_path / "plain")))
    folder = write_checkpoint(tmp_path / "model")
    damage(folder)
    found = resolve(str(folder))
    assert reason in found.unread[name] and found.source().unread == dict(found.unread)
    ids = torch.arange(9)[None]
    assert torch.equal(found.load_model(torch.float32)(ids).logits, plain.load_model(torch.float32)(ids).logits)


def test_patterns_of_model_classes_hide_nothing(tmp_path: Path) -> None:
    """transformers' GLM-4 MoE ignores layer 46 and 92 by number, HY 3 layer 80: real layers of a larger model."""
    layers = {"num_hidden_layers": 4, "first_k_dense_replace": 1}
    folder = tiny_models.save_checkpoint("glm4_moe", tmp_path / "model", **layers)
    stored = load_file(folder / FILE)
    last = {name.replace("layers.3.", "layers.46."): stored[name].clone() for name in stored if "layers.3." in name}
    save_file(stored | last, folder / FILE, {"format": "pt"})
    with pytest.raises(InvalidWeights, match=r"layers\.46\."):
        resolve(str(folder))


def test_masks_of_old_checkpoints_are_no_biases() -> None:
    shapes = {"h.0.attn.bias": (1, 1, 8, 8), "h.0.attn.masked_bias": (), "h.1.attn.bias": (8,), "h.2.attn.bias": (8, 8)}
    assert set(harmless_tensors(shapes, 3)) == {"h.0.attn.bias", "h.0.attn.masked_bias", "h.2.attn.bias"}


def test_no_layer_of_a_decoder_reads_images_or_sound() -> None:
    read = ["model.vision_tower.encoder.layers.0.q.weight", "visual.blocks.0.attn.qkv.weight", "model.connector.weight"]
    lost = ["model.layers.0.audio.weight", "h.1.connector.weight", "language_model.layers.2.visual.proj.weight"]
    assert set(harmless_tensors(dict.fromkeys((*read, *lost), (4, 4)), 3)) == set(read)


def test_an_index_that_names_the_single_file_is_fine(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model")
    write_index(folder, dict.fromkeys(load_file(folder / FILE), FILE))
    weights = resolve(str(folder)).weights
    assert weights is not None and weights.names == (FILE,)


def test_pickled_weights_are_counted_too(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model")
    stored = load_file(folder / FILE)
    (folder / FILE).unlink()
    torch.save(stored | {"model.gate.weight": torch.ones(4)}, folder / "pytorch_model.bin")
    (folder / "training_args.bin").write_bytes(b"not weights")
    with pytest.raises(InvalidWeights, match=r"model\.gate\.weight"):
        resolve(str(folder), trust=Trust.opened())
    torch.save(stored, folder / "pytorch_model.bin")
    assert resolve(str(folder), trust=Trust.opened()).taken


def test_a_refused_build_leaves_nothing(tmp_path: Path) -> None:
    folder = BIASES(tmp_path / "model")
    edit_config(folder, attention_bias=False, mlp_bias=False)
    assert isinstance(refusal(str(folder), tmp_path / "out" / "bundle"), InvalidWeights)
