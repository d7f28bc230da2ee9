"""One trace per architecture, with head widths that the fused kernels accept."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import pytest
from transformers import PreTrainedModel

from dspark_export.graphs.target import export_target
from tests import tiny_models

HEAD_DIM = 16
_WITH_HEAD_DIM = ("llama", "mistral", "qwen3", "gemma2", "gemma3_text", "qwen3_moe", "mixtral", "smollm3")


@pytest.fixture(scope="session")
def traced() -> Callable[[str], tuple[PreTrainedModel, ir.Model]]:
    """The model and its untouched graph; clone the graph before a pass is run on it."""

    @functools.cache
    def trace(arch: str) -> tuple[PreTrainedModel, ir.Model]:
        overrides: dict[str, Any] = {"head_dim": HEAD_DIM} if arch in _WITH_HEAD_DIM else {}
        _, model = tiny_models.make(arch, **overrides)
        return model, export_target(model)

    return trace
