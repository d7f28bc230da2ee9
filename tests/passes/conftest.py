"""The graph of every architecture before any pass."""

from __future__ import annotations

import functools
from collections.abc import Callable

import onnx_ir as ir
import pytest
from transformers import PreTrainedModel

from dspark_export.graphs.target import export_target
from tests import traced as traces


@pytest.fixture(scope="session")
def traced() -> Callable[[str], tuple[PreTrainedModel, ir.Model]]:
    """The model and its untouched graph; clone the graph before a pass is run on it."""

    @functools.cache
    def cut(arch: str) -> tuple[PreTrainedModel, ir.Model]:
        model, trace = traces.traced(arch)
        return model, export_target(trace)

    return cut
