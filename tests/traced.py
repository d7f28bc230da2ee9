"""One trace per architecture, for all tests of a worker; with head widths that the fused kernels accept."""

from __future__ import annotations

import functools
from typing import Any

from transformers import PreTrainedModel

from dspark_export.graphs.decoder import DecoderTrace
from tests import tiny_models

HEAD_DIM = 16
_WITH_HEAD_DIM = ("llama", "mistral", "qwen3", "gemma2", "gemma3_text", "qwen3_moe", "mixtral", "smollm3")


@functools.cache
def traced(arch: str) -> tuple[PreTrainedModel, DecoderTrace]:
    """The untouched model and its trace, from which graphs are cut."""
    overrides: dict[str, Any] = {"head_dim": HEAD_DIM} if arch in _WITH_HEAD_DIM else {}
    _, model = tiny_models.make(arch, **overrides)
    return model, DecoderTrace(model)
