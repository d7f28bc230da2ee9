"""SmolLM2-135M in fp16 through TensorRT-RTX's real compiler, which needs no GPU."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dspark_export.engines.compile import compile_bundle
from dspark_export.engines.options import CompileOptions, Ranges
from dspark_runtime import Bundle
from dspark_runtime.bundle.files import BundleFiles
from tests.engines.graphs import Saved
from tests.engines.test_compile import check

pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx-cu13 (extra `rtx` or `dev`), which is for x86-64 only")
LAYERS = 30
OPTIONS = CompileOptions(
    ranges=Ranges(batch=2, max_length=1024, verify_rows=16, chunk=128),
    compute_capabilities=("8.9",),
    graphs=("target",),
)


def test_attention_is_fused_and_caches_are_updated_in_place(
    fp16: Bundle, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    folder = Path(shutil.copytree(fp16.files.root, tmp_path / "bundle", ignore=shutil.ignore_patterns("*.test-lock")))
    compile_bundle(folder, OPTIONS)
    files = BundleFiles.open(folder)
    (engine,) = files.manifest.engines
    check(Saved(folder, {"target": files.graph("target")}), engine)
    assert (engine.inspection.attention, engine.inspection.aliased) == (LAYERS, 2 * LAYERS)
    assert [profile.name for profile in engine.profiles] == ["decode", "prefill"]
    assert engine.dtype == "float16" and engine.build.plan < 1.3 * engine.build.onnx
    record_property("smollm2_fp16_engine", json.dumps(engine.build.model_dump()))
