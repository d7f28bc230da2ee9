"""Graphs of one model, and a bundle with engines, each made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from dspark_export.build.options import BuildOptions
from dspark_export.build.pipeline import build
from dspark_export.engines.compile import compile_bundle
from tests import tiny_models
from tests.engines.graphs import OPTIONS, Saved, decoder_graphs

pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx-cu13 (extra `rtx` or `dev`), which is for x86-64 only")


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Target and self-draft of a tiny llama in float16."""
    return decoder_graphs("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole bundle with engines of target and self-draft. Copy it before changing it."""
    folder = tmp_path_factory.mktemp("compiled")
    model = tiny_models.save_checkpoint("llama", folder / "model", head_dim=16, num_hidden_layers=2)
    build(BuildOptions(str(model), folder / "bundle", precision="fp16", self_draft="layers=1"))
    compile_bundle(folder / "bundle", OPTIONS)
    return folder / "bundle"
