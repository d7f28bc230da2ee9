"""One trace per architecture and head width, for all tests of a worker; torch's part of it is shared by all workers."""

from __future__ import annotations

import functools
from typing import Any

from transformers import PreTrainedModel

from dspark_export.graphs.decoder import DecoderTrace
from tests import tiny_models


@functools.cache
def traced(arch: str, head_dim: int | None = None) -> tuple[PreTrainedModel, DecoderTrace]:
    """The untouched model and its trace, from which graphs are cut; ``head_dim`` None: its own width of heads."""
    overrides: dict[str, Any] = {} if head_dim is None else {"head_dim": head_dim}
    _, model = tiny_models.make(arch, **overrides)
    return model, DecoderTrace(model)
