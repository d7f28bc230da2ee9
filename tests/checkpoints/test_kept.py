"""``--precision keep``: a bundle stands for the numbers of its checkpoint, bit for bit.

Files are read here by the ``gguf`` package or by what wrote them, bundles by the layouts that docs/sequence-kernels.md
describes: nothing of the project turns integers into numbers on this side.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import gguf
import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from typer.testing import CliRunner

from dspark_export.build.options import BuildOptions
from dspark_export.build.pipeline import build
from dspark_export.checkpoints import resolve
from dspark_export.checkpoints.gguf_blocks import READERS
from dspark_export.cli.main import app
from dspark_export.grids import Grid, NotHeld
from dspark_export.validate.options import ValidateOptions
from dspark_export.validate.run import validate
from dspark_runtime import Bundle
from dspark_runtime.bundle.manifest import Manifest
from dspark_runtime.errors import UsageError
from tests.checkpoints.checkpoint_samples import write_checkpoint
from tests.checkpoints.gguf_models import CASES as MODELS
from tests.checkpoints.gguf_models import fields_of, original, tensors_of
from tests.checkpoints.gguf_samples import encoded, write_gguf
from tests.checkpoints.quantized_samples import CASES, quantize

KINDS = {
    "token_embd.weight": "Q6_K",
    "output.weight": "Q8_0",
    "blk.0.attn_q.weight": "Q4_K",
    "blk.0.attn_k.weight": "Q4_K",
    "blk.0.attn_v.weight": "Q6_K",  # as in files of Q4_K_M: not in one product with the others
    "blk.0.attn_output.weight": "Q4_0",
    "blk.0.ffn_gate.weight": "Q4_1",
    "blk.0.ffn_up.weight": "Q4_1",
    "blk.0.ffn_down.weight": "Q5_0",
    "blk.1.attn_q.weight": "Q4_0",
    "blk.1.attn_k.weight": "Q4_0",
    "blk.1.attn_v.weight": "Q4_0",
    "blk.1.attn_output.weight": "Q3_K",
    "blk.1.ffn_gate.weight": "Q5_1",
    "blk.1.ffn_up.weight": "Q5_K",
    "blk.1.ffn_down.weight": "Q2_K",
    "blk.2.attn_q.weight": "IQ4_NL",
    "blk.2.attn_k.weight": "IQ4_XS",
    "blk.2.attn_v.weight": "IQ4_NL",
    "blk.2.attn_output.weight": "IQ2_XXS",  # vectors of a table: no integers
    "blk.2.ffn_gate.weight": "F16",
    "blk.2.ffn_up.weight": "F16",
    "blk.2.ffn_down.weight": "BF16",
}
NAMES = {
    **{f"attn_{part}": f"self_attn.{part}_proj" for part in "qkv"},
    "attn_output": "self_attn.o_proj",
    **{f"ffn_{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")},
}
HEADS, KV_HEADS = 4, 2


@dataclass(frozen=True)
class Kept:
    """A bundle, and what its file stands for: float32 [out, in] by transformers' names."""

    bundle: Path
    model: Path
    manifest: Manifest
    meant: dict[str, np.ndarray]


def write_mixed(path: Path) -> None:
    """A llama of three layers with a tensor of every type that has integers."""
    case = MODELS["llama"]
    wide = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "num_hidden_layers": 3}
    case = replace(case, config={**case.config, **wide})
    model, rng = original(case), np.random.default_rng(5)
    tensors = {name: np.ascontiguousarray(weight) for name, weight in tensors_of(model, case.arch).items()}
    kinds = {name: gguf.GGMLQuantizationType[kind] for name, kind in KINDS.items()}
    assert set(READERS) <= set(KINDS.values())
    for name, kind in kinds.items():
        tensors[name] = encoded(tensors[name], kind, rng)
    write_gguf(path, fields_of(model, case), tensors, case.arch, kinds)


def numbers_of(path: Path) -> dict[str, np.ndarray]:
    """Matrices of a llama's file, dequantized by gguf, as transformers orders their rows."""
    found = {}
    for tensor in gguf.GGUFReader(path).tensors:
        if len(tensor.shape) != 2:
            continue
        inputs, out = (int(size) for size in tensor.shape)
        weight = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(out, inputs)
        if match := re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", tensor.name):
            if match[2] in ("attn_q", "attn_k"):  # from neighbours to halves
                heads = HEADS if match[2] == "attn_q" else KV_HEADS
                half = out // heads // 2
                order = [
                    head * 2 * half + 2 * i + part for head in range(heads) for part in (0, 1) for i in range(half)
                ]
                weight = weight[order]
            found[f"model.layers.{match[1]}.{NAMES[match[2]]}.weight"] = weight
        else:
            found[
                {"token_embd.weight": "model.embed_tokens.weight", "output.weight": "lm_head.weight"}[tensor.name]
            ] = weight
    return found


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Kept:
    folder = tmp_path_factory.mktemp("kept")
    model, bundle = folder / "model.gguf", folder / "bundle"
    write_mixed(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = BuildOptions(
            model=str(model), out=bundle, precision="keep", self_draft="layers=0,1", threads=1, kernels=True
        )
        made = build(options)
    return Kept(bundle, model, made.manifest, numbers_of(model))


def matrices(bundle: Bundle | Path) -> Iterator[tuple[str, np.ndarray]]:
    """Name and float32 [out, in] of every matrix of the form for the kernels, unpacked as the docs describe it."""
    folder = Path(str(bundle)) / "onnx"
    graph = onnx.load(folder / "target.sequence-kernels.onnx").graph
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type.startswith("Product"):
            width = next(attribute.i for attribute in node.attribute if attribute.name == "N")
            parts = [arrays[name] for name in node.input[1:]]
            name = node.input[1].removesuffix(".tiles").removesuffix(".weight_q").removesuffix(".T")
            yield name, unpacked(node.op_type.removeprefix("Product"), parts)[:, :width].T
    scales = {name.removesuffix("_scale"): name for name in arrays if name.endswith(".rows.weight_scale")}
    for stem, scale in scales.items():
        codes = arrays[f"{stem}_q"].astype(np.float32)
        block = codes.shape[1] // arrays[scale].shape[1]
        rows = codes * np.repeat(arrays[scale], block, axis=1)
        if f"{stem}_minimum" in arrays:
            rows = rows + np.repeat(arrays[f"{stem}_minimum"], block, axis=1)
        yield stem.removesuffix(".rows.weight"), rows


def unpacked(kind: str, parts: list[np.ndarray]) -> np.ndarray:
    """[in, columns of all tiles] in float32."""
    weight = parts[0]
    if kind == "BFloat16":
        return weight.astype(np.float32).transpose(1, 3, 0, 2).reshape(weight.shape[1] * 2, -1)
    if kind.startswith("Float"):
        return weight.astype(np.float32).transpose(1, 0, 2).reshape(weight.shape[1], -1)
    tiles, blocks, steps, columns, quad = weight.shape
    if kind.startswith("Int4"):
        weight = np.stack([weight & 15, weight >> 4], axis=3)
        steps *= 2
    codes = weight.reshape(tiles, blocks, steps, columns, quad).transpose(1, 2, 4, 0, 3)
    codes = codes.reshape(blocks, steps * quad, tiles * columns).astype(np.float32)
    scale, *minimum = [part.transpose(1, 0, 2).reshape(blocks, 1, -1) for part in parts[1:]]
    if minimum:
        return (codes * scale + minimum[0]).reshape(-1, tiles * columns)
    middle = np.float32(8 if kind == "Int4" else 128)
    return ((codes - middle) * scale).reshape(-1, tiles * columns)


def joined(name: str, meant: dict[str, np.ndarray]) -> np.ndarray:
    """The weight ``name``, or those that are packed into it."""
    packs = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
    for packed, parts in packs.items():
        if packed in name:
            return np.concatenate([meant[name.replace(packed, part)] for part in parts])
    return meant[name]


def test_every_matrix_has_the_numbers_of_the_file(mixed: Kept) -> None:
    seen = {}
    for name, weight in matrices(mixed.bundle):
        wanted = joined(name, mixed.meant)
        assert weight.dtype == wanted.dtype == np.float32 and np.array_equal(weight, wanted), name
        seen[name] = weight
    packed = {"model.layers.0.mlp.gate_up_proj.weight", "model.layers.1.self_attn.qkv_proj.weight"}
    assert packed <= seen.keys() and "model.embed_tokens.weight" in seen
    assert "model.layers.0.self_attn.qkv_proj.weight" not in seen, "types differ: the layer's products stay apart"
    assert sum(weight.size for weight in seen.values()) == sum(weight.size for weight in mixed.meant.values())


def test_matrices_are_stored_as_integers(mixed: Kept) -> None:
    (entry,) = [g for g in mixed.manifest.graphs if (g.name, g.variant) == ("target", "sequence-kernels")]
    wanted = {"ProductInt4", "ProductInt4Minimum", "ProductInt8", "ProductInt8Minimum"}
    assert wanted <= set(entry.kernels) and entry.standard_nodes == {}
    graph = onnx.load(mixed.bundle / "onnx/target.sequence-kernels.onnx", load_external_data=False).graph
    floats = [node.input[1] for node in graph.node if re.fullmatch(r"Product(B?Float16|Float32)", node.op_type)]
    assert sorted({name.split(".tiles")[0] for name in floats}) == [
        "model.layers.2.mlp.down_proj.weight",
        "model.layers.2.mlp.gate_up_proj.weight",
        "model.layers.2.self_attn.o_proj.weight",
    ]


def test_what_is_in_floats_is_listed(mixed: Kept) -> None:
    assert mixed.manifest.precision.in_floats == {
        "model.layers.*.self_attn.o_proj.weight": "IQ2_XXS has no integers with a scale"
    }
    shown = CliRunner().invoke(app, ["inspect", str(mixed.bundle)], env={"COLUMNS": "200"})
    assert "integers in the checkpoint, floats in the graphs" in shown.output and "IQ2_XXS" in shown.output


def test_a_kept_bundle_passes_and_speculates_without_a_change(mixed: Kept) -> None:
    bundle = Bundle.open(mixed.bundle, threads=1)
    prompts = [[256, *range(40, 60)], [256, 97, 98, 97, 98, 97, 98]]
    plain = [generation.tokens for generation in bundle.generate(prompts, max_new_tokens=24, speculate=False)]
    for mode in ("ngram", "self-draft", "auto"):
        found = bundle.generate(prompts, max_new_tokens=24, speculate=mode)
        assert [generation.tokens for generation in found] == plain, mode
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = validate(ValidateOptions(mixed.bundle, "torch", model=str(mixed.model), threads=1))
    assert report.passed, [(check.id, check.measured, check.message) for check in report.failures()]


INTEGERS = {
    "gptq 4 bits",
    "gptq 3 bits",
    "gptq 2 bits",
    "gptq_v2",
    "awq",
    *(name for name in CASES if name.startswith(("compressed-tensors, int", "compressed-tensors, pack"))),
    *(name for name in CASES if "fp4" in name),
    "gptq 8 bits, one group",
} - {"compressed-tensors, pack-quantized in another order"}


@pytest.mark.parametrize("case", sorted(INTEGERS))
def test_published_layouts_are_held_exactly(case: str, tmp_path: Path) -> None:
    meant = quantize(write_checkpoint(tmp_path / "model"), *CASES[case])
    checkpoint = resolve(str(tmp_path / "model"))
    model = checkpoint.load_model(torch.float32)
    kept = checkpoint.kept_weights(model, minima=False)
    assert len(meant) == 7
    for name, weight in meant.items():
        form = kept.form(name)
        assert form is not None and not form.minimum, (name, kept.reasons)
        parts = kept.grid(name).stored(form)
        low, high = {"INT4": (-8, 7), "UINT4": (0, 15), "INT8": (-128, 127), "UINT8": (0, 255)}[form.dtype]
        codes = parts["weight_q"].astype(int)
        assert codes.min() >= low and codes.max() <= high and codes.shape == weight.shape
        block = weight.shape[1] // parts["weight_scale"].shape[1]
        assert block == form.block and block % 16 == 0
        zero = np.repeat(parts["weight_zero_point"].astype(int), block, 1) if form.points else 0
        numbers = (codes - zero).astype(np.float32) * np.repeat(parts["weight_scale"], block, 1)
        np.testing.assert_array_equal(numbers, weight.astype(np.float32), err_msg=name)
        assert np.array_equal(model.state_dict()[name].numpy(), numbers)


@pytest.mark.parametrize("case", ["gptq in another order", "compressed-tensors, pack-quantized in another order"])
def test_another_order_of_inputs_stays_in_floats(case: str, tmp_path: Path) -> None:
    meant = quantize(write_checkpoint(tmp_path / "model"), *CASES[case])
    checkpoint = resolve(str(tmp_path / "model"))
    kept = checkpoint.kept_weights(checkpoint.load_model(torch.float32), minima=True)
    assert all(kept.form(name) is None and "act-order" in kept.not_kept()[name] for name in meant)


@pytest.mark.parametrize(
    ("case", "says"),
    [
        (None, "stores floats; choose --precision fp32"),
        ("modelopt fp8", "stores floats of 8 bits"),
        ("fp8, blocks that are cut off", "stores floats of 8 bits"),
    ],
)
def test_floats_have_no_integers_to_keep(case: str | None, says: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model")
    if case is not None:
        quantize(folder, *CASES[case])
    with pytest.raises(UsageError, match=says):
        build(BuildOptions(model=str(folder), out=tmp_path / "bundle", precision="keep"))
    assert not (tmp_path / "bundle").exists()


def test_engines_do_not_keep_integers(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="keep is for the CPU"):
        BuildOptions(model="m", out=tmp_path / "b", precision="keep", backend="tensorrt-rtx")


def test_minima_need_the_kernels(tmp_path: Path) -> None:
    write_mixed(tmp_path / "model.gguf")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checkpoint = resolve(str(tmp_path / "model.gguf"))
    kept = checkpoint.kept_weights(checkpoint.load_model(torch.float32), minima=False)
    assert kept.form("model.layers.0.mlp.gate_up_proj.weight") is None
    assert "--kernels" in kept.not_kept()["model.layers.0.mlp.gate_proj.weight"]
    assert kept.form("lm_head.weight") is not None


def test_integers_of_another_weight_are_not_taken(tmp_path: Path) -> None:
    """A draft may have a weight of the same name: the numbers decide."""
    meant = quantize(write_checkpoint(tmp_path / "model"), *CASES["awq"])
    checkpoint = resolve(str(tmp_path / "model"))
    kept = checkpoint.kept_weights(checkpoint.load_model(torch.float32), minima=True)
    name, weight = next(iter(meant.items()))
    other = weight.astype(np.float32)
    assert kept.holds(name, other)
    other[1, 2] += np.float32(1e-6)
    assert not kept.holds(name, other)


@pytest.mark.parametrize(
    ("grid", "says"),
    [
        (Grid(np.zeros((4, 24), np.int8), np.ones((4, 3), np.float32)), "scales of 8 inputs"),
        (Grid(np.zeros((4, 50), np.int8), np.ones((4, 3), np.float32)), "not a multiple"),
        (Grid(np.full((4, 32), 200, np.int16), np.ones((4, 1), np.float32)), "8 bits hold"),
        (
            Grid(np.full((4, 32), 300, np.int16), np.ones((4, 1), np.float32), minimum=np.ones((4, 1), np.float32)),
            "8 b",
        ),
    ],
)
def test_what_no_block_holds(grid: Grid, says: str) -> None:
    with pytest.raises(NotHeld, match=says):
        grid.in_blocks().form()


def test_the_tied_embedding_is_kept_in_both_places(tmp_path: Path) -> None:
    """A GGUF without ``output.weight``: the table is the head."""
    case = MODELS["llama"]
    config = {**case.config, "hidden_size": 64, "head_dim": 16, "tie_word_embeddings": True}
    case = replace(case, config=config)
    model = original(case)
    tensors = {name: np.ascontiguousarray(weight) for name, weight in tensors_of(model, case.arch).items()}
    tensors.pop("output.weight", None)
    q4_1 = gguf.GGMLQuantizationType.Q4_1
    tensors["token_embd.weight"] = encoded(tensors["token_embd.weight"], q4_1, np.random.default_rng(0))
    write_gguf(tmp_path / "model.gguf", fields_of(model, case), tensors, case.arch, {"token_embd.weight": q4_1})
    options = BuildOptions(
        model=str(tmp_path / "model.gguf"),
        out=tmp_path / "b",
        precision="keep",
        self_draft="none",
        threads=1,
        kernels=True,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        build(options)
    wanted = numbers_of(tmp_path / "model.gguf")["model.embed_tokens.weight"]
    found = [
        weight for name, weight in matrices(tmp_path / "b") if name in ("lm_head.weight", "model.embed_tokens.weight")
    ]
    assert len(found) == 2 and all(np.array_equal(weight, wanted) for weight in found)
