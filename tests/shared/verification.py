"""What tests of verification share: the ONNX functions as sessions and a sampler with given numbers."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from dspark_export.graphs.verify import build_verify_chain_model, build_verify_model
from dspark_runtime.speculation.sampling import SamplingParams, draw_token, inverse_cdf

Array = np.ndarray[Any, Any]


@cache
def session(kind: str) -> ort.InferenceSession:
    model = build_verify_model() if kind == "tree" else build_verify_chain_model()
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = 1
    return ort.InferenceSession(ir.to_proto(model).SerializeToString(), settings)


class Scripted:
    """A Sampler with given random numbers."""

    def __init__(self, params: SamplingParams, accept: Array, draw: Array) -> None:
        self.params, self._accept, self._draw = params, accept, draw

    def accept_at(self, position: int) -> float:
        return float(self._accept[position - 1])

    def draw_from(self, weights: Array, position: int) -> int:
        return inverse_cdf(weights, float(self._draw[position - 1]))

    def draw(self, logits: Array, position: int) -> int:
        return draw_token(logits, self.params, float(self._draw[position - 1]))
