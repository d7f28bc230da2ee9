"""Every type of tensor a GGUF file may have, under the settings that change numbers, against llama.cpp."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from dspark_export.build.options import BuildOptions
from dspark_export.build.pipeline import build
from dspark_export.checkpoints import resolve
from dspark_export.checkpoints.gguf_file import readable_kinds
from dspark_export.validate.llama_cpp import check_llama_cpp, installed
from dspark_export.validate.options import ValidateOptions
from dspark_export.validate.run import validate
from tests.checkpoints.gguf_models import CASES, fields_of, original, tensors_of, texts, write_case
from tests.checkpoints.gguf_samples import encoded

pytestmark = pytest.mark.skipif(not installed(), reason="no wheel of llama.cpp (pip install xllamacpp)")
KINDS = sorted(readable_kinds())
QUICK = {("Q4_0", "llama 3.1"), ("Q6_K", "gemma3 4B"), ("IQ4_NL", "qwen2, yarn")}
SETTINGS = ("llama 3.1", "qwen2, yarn", "gemma3 4B", "llama, biases")
WIDE = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}
CASES_OF_KINDS = [
    pytest.param(kind, name, marks=() if (kind, name) in QUICK else pytest.mark.slow, id=f"{kind}, {name}")
    for kind in KINDS
    for name in SETTINGS
]


@pytest.mark.parametrize(("kind", "name"), CASES_OF_KINDS)
def test_a_type_gives_llama_cpps_logits(kind: str, name: str, tmp_path: Path) -> None:
    case = CASES[name]
    case = replace(case, config={**case.config, **WIDE})
    model, stored = original(case), gguf.GGMLQuantizationType[kind]
    rng = np.random.default_rng(3)
    fields = fields_of(model, case) | {
        f"{case.arch}.{key}": 64 for key in ("rope.dimension_count",) if f"{key}" in case.keys
    }
    tensors = {key: np.ascontiguousarray(weight) for key, weight in tensors_of(model, case.arch).items()}
    case.edit(tensors)
    if "rope_freqs.weight" in tensors:
        tensors["rope_freqs.weight"] = np.repeat(tensors["rope_freqs.weight"], 4)
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", case.arch)
    for key, value in fields.items():
        _add(writer, key, value)
    for key, weight in tensors.items():
        if weight.ndim == 2 and key.startswith("blk.") and kind != "F32":
            writer.add_tensor(key, encoded(weight, stored, rng), raw_dtype=stored)
        else:
            writer.add_tensor(key, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checkpoint = resolve(str(tmp_path / "model.gguf"))
    assert checkpoint.gguf is not None and kind in checkpoint.gguf.kinds.values()
    model = checkpoint.load_model(torch.float32)
    if kind not in ("F32", "F16", "BF16"):
        round_activations(model, gguf.GGML_QUANT_SIZES[stored][0])
    check = check_llama_cpp(checkpoint.gguf, model, texts(200), 1)
    assert check.status == "passed", (check.measured, check.message)


def round_activations(model: torch.nn.Module, width: int) -> None:
    """Round what goes into quantized products to 8 bits in blocks of ``width``, as llama.cpp does: that alone can move
    the logits of these models by 0.06 of their range."""

    def rounded(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        blocks = args[0].unflatten(-1, (-1, width))
        step = (blocks.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-30)
        return ((blocks / step).round() * step).flatten(-2).reshape(args[0].shape),  # fmt: skip

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "lm_head" not in name:
            module.register_forward_pre_hook(rounded)


def _add(writer: gguf.GGUFWriter, key: str, value: object) -> None:
    adds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    if value is not None:
        adds.get(type(value), writer.add_array)(key, value)


def test_a_file_that_is_read_otherwise_fails_the_check(tmp_path: Path) -> None:
    """The reference shares no reader with ours: a model with another rotary base is told apart."""
    write_case(CASES["llama"], tmp_path / "model.gguf")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checkpoint = resolve(str(tmp_path / "model.gguf"))
    assert checkpoint.gguf is not None
    assert check_llama_cpp(checkpoint.gguf, checkpoint.load_model(torch.float32), texts(200), 1).status == "passed"
    checkpoint.config.rope_parameters["rope_theta"] = 10000.0
    check = check_llama_cpp(checkpoint.gguf, checkpoint.load_model(torch.float32), texts(200), 1)
    assert check.status == "failed" and "read otherwise" in check.message


@pytest.mark.slow
def test_a_validation_says_so(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write_case(CASES["llama 3.1"], tmp_path / "model.gguf")
        options = BuildOptions(model=str(tmp_path / "model.gguf"), out=tmp_path / "b", self_draft="none", threads=1)
        build(options)
        report = validate(ValidateOptions(tmp_path / "b", "llama.cpp", model=str(tmp_path / "model.gguf"), threads=1))
    assert [check.status for check in report.checks if check.id == "numerics.llama.cpp"] == ["passed"]
