"""The graph of every architecture before any pass, with head widths that the fused kernels accept."""

from __future__ import annotations

import functools
from collections.abc import Callable

import onnx_ir as ir
import pytest
from transformers import PreTrainedModel

from dspark_export.graphs.target import export_target
from tests import traced as traces

HEAD_DIM = 16
_OTHER_HEADS = ("qwen3", "gemma2", "gemma3_text")


@pytest.fixture(scope="session")
def traced() -> Callable[[str], tuple[PreTrainedModel, ir.Model]]:
    """The model and its untouched graph; clone the graph before a pass is run on it."""

    @functools.cache
    def cut(arch: str) -> tuple[PreTrainedModel, ir.Model]:
        model, trace = traces.traced(arch, HEAD_DIM) if arch in _OTHER_HEADS else traces.traced(arch)
        return model, export_target(trace)

    return cut
