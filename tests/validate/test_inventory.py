"""The weights of a checkpoint's files against the graph: what a loader drops or misreads is found without it.

The graph stays as it was built, and the file changes: to the check that is a loader that read something else.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from _pytest.mark import ParameterSet
from safetensors.torch import load_file, save_file

from dspark_export.build.options import BuildOptions
from dspark_export.build.pipeline import build
from dspark_export.checkpoints import fit, resolve
from dspark_export.graphs.decoder import DecoderTrace
from dspark_export.graphs.target import export_target
from dspark_export.passes import optimize
from dspark_export.passes.precision import PrecisionSettings, apply_precision
from dspark_export.validate.inventory import Compared, compare
from dspark_export.validate.options import ValidateOptions
from dspark_export.validate.run import validate
from dspark_runtime.bundle.precisions import Weights
from tests import tiny_models
from tests.checkpoints import gguf_models, quantized_samples
from tests.checkpoints.checkpoint_samples import edit_config
from tests.checkpoints.gguf_samples import write_gguf

FILE = "model.safetensors"
Stored = dict[str, torch.Tensor]
PRECISIONS: tuple[Weights, ...] = ("fp32", "bf16", "int8", "int4")
DAMAGED: tuple[Weights, ...] = ("fp32", "int4")


def graph_of(model: Path, precision: Weights = "fp32") -> ir.Model:
    """The target graph that a build would store."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    checkpoint = resolve(str(model))
    loaded = checkpoint.load_model(dtype)
    graph = export_target(DecoderTrace(loaded))
    kept = checkpoint.kept_weights(loaded, minima=True) if precision == "keep" else None
    optimize(graph, kept)
    apply_precision(graph, PrecisionSettings(precision), kept)
    return graph


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama with biases."""
    folder = tmp_path_factory.mktemp("llama")
    return tiny_models.save_checkpoint("llama", folder, attention_bias=True, initializer_range=0.1)


@pytest.fixture(scope="module")
def graphs(llama: Path) -> dict[str, ir.Model]:
    return {precision: graph_of(llama, precision) for precision in PRECISIONS}


def changed(folder: Path, to: Path, change: Callable[[Stored], object]) -> Path:
    """A copy of a checkpoint with other weights."""
    shutil.copytree(folder, to)
    stored = load_file(to / FILE)
    change(stored)
    save_file(stored, to / FILE, {"format": "pt"})
    return to


def clean(found: Compared) -> bool:
    return not found.lost and not found.extra


DOWN = "model.layers.1.mlp.down_proj.weight"
QUERY = "model.layers.1.self_attn.q_proj.weight"
BIAS = "model.layers.2.self_attn.k_proj.bias"
NORM = "model.layers.0.input_layernorm.weight"


def one_number(name: str, by: float) -> Callable[[Stored], object]:
    def change(stored: Stored) -> None:
        stored[name].view(-1)[5] += by

    return change


def swapped(one: str, other: str) -> Callable[[Stored], object]:
    def change(stored: Stored) -> None:
        stored[one], stored[other] = stored[other], stored[one]

    return change


def reversed_rows(name: str) -> Callable[[Stored], object]:
    return lambda stored: stored.update({name: stored[name].flip(0).contiguous()})


# What differs between file and graph, and the tensors that are named.
FAULTS: dict[str, tuple[Callable[[Stored], object], set[str]]] = {
    "a matrix altered in one place": (one_number(DOWN, 0.2), {DOWN}),
    "a part of a packed matrix altered": (one_number(QUERY, 0.2), {QUERY}),
    "a bias altered": (one_number(BIAS, 0.01), {BIAS}),
    "a norm altered": (one_number(NORM, 0.01), {NORM}),
    "a table altered": (one_number("model.embed_tokens.weight", 0.5), {"model.embed_tokens.weight"}),
    "rows in another order": (reversed_rows(QUERY), {QUERY}),
    "layers in another order": (
        swapped(DOWN, DOWN.replace("1", "2")),
        {DOWN, DOWN.replace("1", "2")},
    ),
    "a matrix dropped": (
        lambda stored: stored.update({"model.layers.0.gate.weight": torch.randn(64, 64)}),
        {"model.layers.0.gate.weight"},
    ),
    "a vector dropped": (
        lambda stored: stored.update({"model.layers.0.self_attn.q_norm.weight": torch.rand(16)}),
        {"model.layers.0.self_attn.q_norm.weight"},
    ),
    "a layer dropped": (
        lambda stored: stored.update({DOWN.replace("1", "3"): torch.randn(64, 96)}),
        {DOWN.replace("1", "3")},
    ),
}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_file_a_graph_was_made_of_is_found_in_it(llama: Path, graphs: dict[str, ir.Model], precision: str) -> None:
    found = compare(graphs[precision], llama, exact=False)
    assert clean(found), found
    assert found.count == len(load_file(llama / FILE))


@pytest.mark.parametrize("precision", DAMAGED)
@pytest.mark.parametrize("case", FAULTS)
def test_what_differs_is_named(
    llama: Path, graphs: dict[str, ir.Model], case: str, precision: str, tmp_path: Path
) -> None:
    change, names = FAULTS[case]
    found = compare(graphs[precision], changed(llama, tmp_path / "model", change), exact=False)
    assert set(found.lost) == names


@pytest.mark.parametrize("precision", DAMAGED)
def test_a_weight_of_the_graph_that_no_file_has_is_named(
    llama: Path, graphs: dict[str, ir.Model], precision: str, tmp_path: Path
) -> None:
    found = compare(graphs[precision], changed(llama, tmp_path / "model", lambda s: s.pop(DOWN)), exact=False)
    assert not found.lost
    assert [name.removesuffix(".T") for name in found.extra] == [DOWN]


def test_tensors_that_have_no_part_in_the_text_are_told_of(
    llama: Path, graphs: dict[str, ir.Model], tmp_path: Path
) -> None:
    beside = {
        "mtp.layers.0.self_attn.q_proj.weight": torch.randn(64, 64),
        "model.layers.3.eh_proj.weight": torch.randn(64, 128),
        "model.layers.3.self_attn.q_proj.weight": torch.randn(64, 64),
        "vision_tower.patch.weight": torch.randn(64, 64),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.rand(8),
        "model.layers.0.self_attn.k_proj.k_scale": torch.rand(1),
    }
    lost = {"model.layers.0.audio.weight": torch.randn(64, 64)}  # no layer of a decoder reads sound
    folder = changed(llama, tmp_path / "model", lambda stored: stored.update(beside | lost))
    found = compare(graphs["fp32"], folder, exact=False)
    assert set(found.unread) == set(beside) and set(found.lost) == set(lost) and not found.extra


QUICK = (
    "gptq 3 bits",
    "gptq in another order",
    "awq",
    "fp8, blocks that are cut off",
    "compressed-tensors, pack-quantized with zero points",
    "modelopt nvfp4",
    *("llama", "gemma", "mixtral", "qwen2, yarn"),
)


def slow(cases: Iterable[str]) -> list[ParameterSet]:
    """All ``cases``; those that are not quick are slow."""
    return [pytest.param(case, marks=() if case in QUICK else pytest.mark.slow) for case in cases]


@pytest.mark.parametrize("case", slow(quantized_samples.CASES))
def test_quantized_checkpoints_are_read_a_second_time(case: str, tmp_path: Path) -> None:
    folder = tiny_models.save_checkpoint("llama", tmp_path / "model")
    quantized_samples.quantize(folder, *quantized_samples.CASES[case])
    graph = graph_of(folder)
    assert clean(compare(graph, folder, exact=False))

    def change(stored: Stored) -> None:
        name = next(name for name in stored if "down_proj" in name and "scale" in name)
        whole = not stored[name].is_floating_point()  # exponents of two
        stored[name] = stored[name] + 1 if whole else (stored[name].float() * 2).to(stored[name].dtype)

    assert len(compare(graph, changed(folder, tmp_path / "other", change), exact=False).lost) == 1


# GGUF ----------------------------------------------------------------------------------------------------------------

Tensors = dict[str, np.ndarray]


def write(case: str, path: Path, change: Callable[[Tensors], object] = lambda _: None, **keys: object) -> Path:
    """A sample file, changed."""
    sample = gguf_models.CASES[case]
    sample = replace(sample, keys={**sample.keys, **keys})
    model = gguf_models.original(sample)
    tensors = {name: np.ascontiguousarray(w) for name, w in gguf_models.tensors_of(model, sample.arch).items()}
    sample.edit(tensors)
    change(tensors)
    return write_gguf(path, gguf_models.fields_of(model, sample), tensors, sample.arch)


@pytest.fixture(scope="module")
def gguf_graphs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ir.Model]:
    folder, made = tmp_path_factory.mktemp("gguf"), dict[str, ir.Model]()

    def graph(case: str) -> ir.Model:
        if case not in made:
            made[case] = graph_of(write(case, folder / f"{len(made)}.gguf"))
        return made[case]

    return graph


@pytest.mark.parametrize("case", slow(gguf_models.CASES))
def test_gguf_files_are_found(case: str, gguf_graphs: Callable[[str], ir.Model], tmp_path: Path) -> None:
    found = compare(gguf_graphs(case), write(case, tmp_path / "model.gguf"), exact=False)
    assert clean(found), found


def altered(name: str) -> Callable[[Tensors], object]:
    def change(tensors: Tensors) -> None:
        tensors[name] = tensors[name].copy()
        tensors[name].reshape(-1)[5] += 0.01

    return change


def unpaired(tensors: Tensors) -> None:
    """As if rotary pairs had not been moved to halves."""
    heads = tensors["blk.0.attn_q.weight"].reshape(4, -1, 2, tensors["blk.0.attn_q.weight"].shape[1])
    tensors["blk.0.attn_q.weight"] = np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(-1, heads.shape[-1])


@pytest.mark.parametrize(
    ("case", "change", "keys", "named"),
    [
        ("llama", altered("blk.1.ffn_up.weight"), {}, "blk.1.ffn_up.weight"),
        ("llama", altered("blk.1.attn_q.weight"), {}, "blk.1.attn_q.weight"),
        ("llama", unpaired, {}, "blk.0.attn_q.weight"),
        ("llama", lambda t: t.update({"blk.0.attn_q.bias": np.ones(64, np.float32)}), {}, "blk.0.attn_q.bias"),
        ("llama", lambda _: None, {"rope.freq_base": 20000.0}, "rope.freq_base"),
        ("llama", lambda _: None, {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0}, "rope.freq_base"),
        ("gemma", lambda t: t.update({"output_norm.weight": t["output_norm.weight"] - 1}), {}, "output_norm.weight"),
    ],
)
def test_what_differs_from_a_gguf_file_is_named(
    case: str,
    change: Callable[[Tensors], object],
    keys: dict[str, object],
    named: str,
    gguf_graphs: Callable[[str], ir.Model],
    tmp_path: Path,
) -> None:
    found = compare(gguf_graphs(case), write(case, tmp_path / "model.gguf", change, **keys), exact=False)
    assert named in found.lost


def test_rotary_factors_are_part_of_the_inventory(gguf_graphs: Callable[[str], ir.Model], tmp_path: Path) -> None:
    def factors(tensors: Tensors) -> None:
        width = tensors["blk.0.attn_q.weight"].shape[0] // 4
        tensors["rope_freqs.weight"] = np.linspace(1, 8, width // 2, dtype=np.float32)

    found = compare(gguf_graphs("llama"), write("llama", tmp_path / "model.gguf", factors), exact=False)
    assert set(found.lost) == {"rope.freq_base"}


# A whole validation --------------------------------------------------------------------------------------------------


def test_a_bundle_of_a_careless_loader_fails_by_its_inventory_alone(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        fit, "harmless_tensors", lambda shapes, *_: {n: "dropped" for n in shapes if n.endswith(".bias")}
    )
    folder = shutil.copytree(llama, tmp_path / "model")
    edit_config(folder, attention_bias=False)
    bundle = tmp_path / "bundle"
    build(BuildOptions(model=str(folder), out=bundle, self_draft="none", threads=1, phrases=0))
    report = validate(ValidateOptions(bundle, model=str(folder), threads=1, against="torch"))
    (failed,) = report.failures()
    assert failed.id == "numerics.inventory" and failed.measured == 12
    assert "self_attn.q_proj.bias" in failed.message
