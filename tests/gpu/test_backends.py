"""Bundles on a real GPU: every backend that can be opened gives the CPU's logits, and speculative text is plain text.

TensorRT-RTX needs a GPU of a family it is for; ONNX Runtime's CUDA provider needs onnxruntime-gpu and CUDA's libraries.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from dspark_export.build.options import BuildOptions
from dspark_export.build.pipeline import build
from dspark_export.build.row_noise import row_logits
from dspark_export.engines.compile import compile_bundle
from dspark_export.engines.options import CompileOptions, Ranges
from dspark_runtime import Bundle
from dspark_runtime.backends.opening import DeviceBackend
from dspark_runtime.backends.tensorrt_check import RTX_DEFAULT_TARGETS
from dspark_runtime.backends.tensorrt_device import this_device
from tests import tiny_models

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(this_device() is None, reason="needs an NVIDIA GPU; this machine has none"),
]
BACKENDS = ("tensorrt-rtx", "tensorrt", "onnxruntime-cuda")
RANGES = Ranges(batch=2, max_length=512, verify_rows=16, chunk=64)
PROMPTS = [[5, 6, 7, 8] * 6, list(range(3, 40))]


def missing(backend: str) -> str:
    """Why ``backend`` cannot run here; empty if nothing is missing."""
    device = this_device()
    if backend == "onnxruntime-cuda":
        there = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
        return "" if there else "needs onnxruntime-gpu"
    if importlib.util.find_spec(backend.replace("-", "_")) is None:
        return f"needs {backend}"
    if backend == "tensorrt-rtx" and device is not None and device.capability not in RTX_DEFAULT_TARGETS:
        return f"TensorRT-RTX is not for compute capability {device.capability}"
    return ""


@pytest.fixture(scope="module", params=BACKENDS)
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Bundle]:
    """A bundle on the GPU and on the CPU."""
    backend: Any = request.param
    if why := missing(backend):
        pytest.skip(why)
    folder: Path = tmp_path_factory.mktemp("bundle")
    model = tiny_models.save_checkpoint("llama", folder / "model", head_dim=64, num_hidden_layers=4)
    precision: Any = "fp32" if backend == "onnxruntime-cuda" else "fp16"
    build(BuildOptions(str(model), folder / "out", precision=precision, self_draft="layers=0,2"))
    if backend != "onnxruntime-cuda":
        compile_bundle(folder / "out", CompileOptions(flavour=backend, ranges=RANGES))
    return Bundle.open(folder / "out", backend=backend), Bundle.open(folder / "out")


def test_logits_are_those_of_the_cpu(opened: tuple[Bundle, Bundle]) -> None:
    gpu, cpu = opened
    tolerance = 1e-3 if cpu.manifest.precision.weights == "fp32" else 3e-2
    for ids in PROMPTS:
        own, other = (row_logits(bundle.target, ids, 4, 8) for bundle in (gpu, cpu))
        assert np.abs(own - other).max() <= tolerance * np.abs(other).max()


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("mode", ["ngram", "self-draft", "ngram+self-draft"])
def test_speculative_text_is_plain_text(
    opened: tuple[Bundle, Bundle], mode: str, batch_size: int, temperature: float
) -> None:
    gpu, _ = opened
    options: dict[str, Any] = {"max_new_tokens": 48, "ignore_eos": True, "temperature": temperature, "seed": 2}
    plain = gpu.generate(PROMPTS, speculate="off", batch_size=batch_size, **options)
    drafted = gpu.generate(PROMPTS, speculate=mode, batch_size=batch_size, draft_length=4, **options)
    assert [g.tokens for g in drafted] == [g.tokens for g in plain]


@pytest.mark.parametrize("mode", ["off", "ngram+self-draft"])
def test_work_beside_passes_changes_nothing(opened: tuple[Bundle, Bundle], mode: str) -> None:
    gpu, cpu = opened
    settings = replace(gpu.engine_options, overlap=False)
    assert isinstance(gpu._backend, DeviceBackend)
    name = gpu._backend._name
    serial = Bundle(cpu.files, settings, gpu.exact, None, DeviceBackend(cpu.files, name, settings))
    drafts: dict[str, Any] = {} if mode == "off" else {"draft_length": 4}
    options = {"max_new_tokens": 48, "ignore_eos": True, "speculate": mode, **drafts}
    found, expected = (bundle.generate(PROMPTS, **options) for bundle in (gpu, serial))
    assert [(g.tokens, g.text) for g in found] == [(g.tokens, g.text) for g in expected]
    assert gpu.target.open(gpu.target.allocate(1, 64)).overlaps
    assert not serial.target.open(serial.target.allocate(1, 64)).overlaps
