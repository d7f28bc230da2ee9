"""``compile`` and ``build --backend`` as a user runs them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from typer.testing import CliRunner

from dspark_export.build.row_noise import row_logits
from dspark_export.cli.main import app
from dspark_export.validate.probe import with_float_products
from dspark_runtime import Bundle
from dspark_runtime.backends.tensorrt_device import this_device
from dspark_runtime.bundle.engine_entry import EngineEntry
from dspark_runtime.bundle.files import BundleFiles
from tests import tiny_models


def test_build_with_a_backend_compiles_every_decoder(tmp_path: Path) -> None:
    model = tiny_models.save_checkpoint("llama", tmp_path / "model", head_dim=16, num_hidden_layers=1)
    out = tmp_path / "bundle"
    command = ["build", str(model), "--out", str(out), "--self-draft", "none", "--backend", "tensorrt-rtx"]
    refused = CliRunner().invoke(app, command)
    assert refused.exit_code == 2 and "add --precision fp16" in refused.stderr and not out.exists()
    result = CliRunner().invoke(app, [*command, "--precision", "bf16", "--progress", "json"])
    assert result.exit_code == 0, result.output
    assert '{"stage": "compile"}' in result.stderr and "1 fused attentions, 2 caches in place" in result.stdout
    (engine,) = BundleFiles.open(out).manifest.engines
    assert (engine.graph, engine.dtype, engine.capacity) == ("target", "bfloat16", tiny_models.MAX_POSITIONS)
    assert {name: high for name, (_, _, high) in engine.profiles[1].dims.items()} == {
        "batch": 1,
        "tokens": 512,
        "kv_len": 512,
        "rows": 32,
        "capacity": 512,
    }


def codes_of(bundle: Path) -> dict[str, np.ndarray]:
    """The integers of every quantized matrix."""
    model = ir.load(bundle / BundleFiles.open(bundle).graph("target", prefer=()).file)
    return {
        name: value.const_value.numpy().astype(np.int32)
        for name, value in model.graph.initializers.items()
        if name.endswith("weight_q") and value.const_value is not None
    }


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_quantized_weights_compile_with_half_activations(tmp_path: Path, precision: str) -> None:
    model = tiny_models.save_checkpoint(
        "llama", tmp_path / "model", head_dim=32, hidden_size=64, intermediate_size=128, num_hidden_layers=1
    )
    plain = ["build", str(model), "--self-draft", "none", "--phrases", "0", "--precision", precision]
    build = [*plain, "--block-size", "32"]  # half as wide as the embedding, which is quantized then
    result = CliRunner().invoke(app, [*build, "--out", str(tmp_path / "half"), "--backend", "tensorrt-rtx"])
    assert result.exit_code == 0, result.output
    files = BundleFiles.open(tmp_path / "half")
    (engine,) = files.manifest.engines
    assert (engine.dtype, engine.inspection.attention, engine.inspection.aliased) == ("float16", 1, 2)
    assert files.graph("target", prefer=()).dtype == "float16" and files.manifest.precision.weights == precision
    result = CliRunner().invoke(app, [*build, "--out", str(tmp_path / "full"), "--no-quantize-embedding"])
    assert result.exit_code == 0, result.output
    ids = list(range(3, 40))
    both = (with_float_products(Bundle.open(tmp_path / name, threads=1)) for name in ("half", "full"))
    half, full = (row_logits(bundle.target, ids, 4, 8) for bundle in both)
    if precision == "int8":
        assert np.abs(half - full).max() < 0.02 * np.abs(full).max()
    # Weights rounded to half precision first fall on the other side of a boundary now and then, never further.
    codes = [codes_of(tmp_path / name) for name in ("half", "full")]
    assert codes[0].keys() == codes[1].keys() and len(codes[0]) > 3
    for name, own in codes[0].items():
        steps = np.abs(own - codes[1][name])
        assert steps.max() <= 1 and (steps > 0).mean() < 0.02, name
    result = CliRunner().invoke(
        app, [*build, "--out", str(tmp_path / "rows"), "--backend", "tensorrt-rtx", "--quantize-embedding"]
    )
    assert result.exit_code == 6 and "again with --no-quantize-embedding" in result.stderr
    for given in (["--activations", "fp32"], ["--precision", "fp16", "--activations", "fp16"]):
        refused = CliRunner().invoke(app, [*plain, "--out", str(tmp_path / "no"), "--backend", "tensorrt-rtx", *given])
        assert refused.exit_code == 2 and "--activations" in refused.stderr and not (tmp_path / "no").exists()


def test_compile_replaces_engines_and_keeps_others(compiled: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(compiled, tmp_path / "bundle"))
    command = ["compile", str(bundle), "--graph", "target", "--batch", "3", "--json"]
    result = CliRunner().invoke(app, [*command, "--compute-capability", "8.9"])
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    (made,) = (EngineEntry.model_validate_json(json.dumps(engine)) for engine in answer["engines"])
    assert answer["bundle"] == str(bundle) and made.targets == ("8.9",) and made.profiles[0].dims["batch"][2] == 3
    entries = BundleFiles.open(bundle).manifest.engines
    assert [(e.graph, e.targets) for e in entries] == [("target", ()), ("self_draft", ()), ("target", ("8.9",))]
    again = CliRunner().invoke(app, [*command, "--max-length", "64", "--chunk", "16", "--compute-capability", "8.9"])
    assert again.exit_code == 0, again.output
    entries = BundleFiles.open(bundle).manifest.engines
    assert [(e.targets, e.capacity) for e in entries] == [((), 128), ((), 128), (("8.9",), 64)]
    assert sorted(p.name for p in bundle.rglob("*.plan")) == ["self_draft.plan", "target.plan", "target.plan"]


def test_a_bundle_with_engines_still_generates_on_the_cpu(compiled: Path) -> None:
    assert len(Bundle.open(compiled, threads=1).generate("x", max_new_tokens=4, ignore_eos=True).tokens) == 4


@pytest.mark.skipif(this_device() is not None, reason="this machine has a GPU")
@pytest.mark.parametrize(
    ("backend", "code", "words"),
    [
        ("tensorrt-rtx", 8, "needs an NVIDIA GPU of compute capability 8.0, 8.6"),
        ("tensorrt", 7, "this bundle has no tensorrt engine of target; run `dspark-export compile"),
        ("onnxruntime-cuda", 8, "needs an NVIDIA GPU and its driver"),
        ("cuda", 2, "choose onnxruntime, onnxruntime-cuda, tensorrt, tensorrt-rtx"),
    ],
)
def test_generate_says_why_a_backend_cannot_be_used(compiled: Path, backend: str, code: int, words: str) -> None:
    result = CliRunner().invoke(app, ["generate", str(compiled), "x", "--raw", "--backend", backend])
    assert result.exit_code == code and words in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--max-length", "513"], 2, "more than the 512 positions"),
        (["--chunk", "0"], 2, "--chunk 0"),
        (["--graph", "nothing"], 2, "--graph nothing is not a graph"),
        (["--compute-capability", "9.0"], 2, "data-centre GPUs"),
        (["--plugins", "aot"], 2, "--plugins aot is for tensorrt"),
        (["--plugins", "library"], 2, "with CMake, which makes libdspark_plugins.so, and set DSPARK_PLUGINS"),
        (["--backend", "tensorrt"], 8, "pip install tensorrt polygraphy"),
    ],
)
def test_mistakes(compiled: Path, arguments: list[str], code: int, words: str) -> None:
    result = CliRunner().invoke(app, ["compile", str(compiled), *arguments])
    assert result.exit_code == code and words in result.stderr
    assert "Traceback" not in result.stderr


def test_a_float32_bundle_is_refused(compiled: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(compiled, tmp_path / "bundle"))
    raw = json.loads((bundle / "manifest.json").read_bytes())
    for graph in raw["graphs"]:
        graph["dtype"] = "float32"
    (bundle / "manifest.json").write_text(json.dumps(raw), encoding="utf-8")
    result = CliRunner().invoke(app, ["compile", str(bundle)])
    assert result.exit_code == 6 and "--precision fp16 or bf16" in result.stderr
