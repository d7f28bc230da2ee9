"""The host build of the plugin library, called with numpy arrays."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from dspark_runtime.speculation.sampling import SamplingParams

Array = np.ndarray[Any, Any]

DTYPES: dict[str, tuple[int, Any]] = {
    "float32": (0, np.float32),
    "float16": (1, np.float16),
    "bfloat16": (2, ml_dtypes.bfloat16),
}
KINDS = {"none": 0, "vanilla": 1, "gated": 2, "rnn": 3}
_CODES = {np.dtype(dtype): code for code, dtype in DTYPES.values()}


class _Sampling(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("temperature", "top_k", "top_p", "min_p")]


class _Draft(ctypes.Structure):
    _fields_ = [
        ("batch", ctypes.c_int64),
        ("drafts", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("kind", "rank", "hidden", "vocab", "embeddings", "uses_token")),
        *(
            (name, ctypes.c_void_p)
            for name in (
                *("base_logits", "hidden_rows", "anchors", "temperature", "uniforms", "w1", "w2", "mix", "mix_bias"),
                *("confidence", "confidence_bias", "token_map", "tokens", "probs", "confidences"),
            )
        ),
    ]


class _Cache(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("tensors", "batch", "capacity")),
        *((name, ctypes.c_void_p) for name in ("data", "heads", "row_bytes")),
    ]


def rounded(params: SamplingParams) -> SamplingParams:
    """The parameters as the graph sees them: float32 numbers."""
    return SamplingParams(
        float(np.float32(params.temperature)),
        params.top_k,
        float(np.float32(params.top_p)),
        float(np.float32(params.min_p)),
    )


def sampling_inputs(params: Sequence[SamplingParams]) -> dict[str, Array]:
    """``params`` as the graph's tensors, one value per sequence."""
    return {
        "temperature": np.array([p.temperature for p in params], np.float32),
        "top_k": np.array([p.top_k for p in params], np.int64),
        "top_p": np.array([p.top_p for p in params], np.float32),
        "min_p": np.array([p.min_p for p in params], np.float32),
    }


def _pointer(array: Array | None) -> int | None:
    if array is None:
        return None
    assert array.flags.c_contiguous
    return int(array.ctypes.data)


def _sampling(inputs: dict[str, Array]) -> Any:
    return ctypes.byref(_Sampling(*(_pointer(inputs[name]) for name in ("temperature", "top_k", "top_p", "min_p"))))


class HostLibrary:
    """Functions of plugins/include/dspark/host.h; raises ValueError with the number of the error they return."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))

    def _call(self, name: str, *arguments: Any) -> None:
        function = getattr(self._library, name)
        typed = [ctypes.c_int64(a) if isinstance(a, int) else a for a in arguments]
        if wrong := function(*(ctypes.c_void_p(_pointer(a)) if isinstance(a, np.ndarray) else a for a in typed)):
            raise ValueError(f"{name}: error {wrong}")

    def math(self, function: int, x: Array) -> Array:
        """0 exp of numbers <= 0, 1 sigmoid, 2 tanh."""
        y = np.empty_like(x)
        self._library.dspark_math(
            ctypes.c_int32(function),
            ctypes.c_void_p(_pointer(x)),
            ctypes.c_void_p(_pointer(y)),
            ctypes.c_int64(x.size),
        )
        return y

    def to_float(self, x: Array) -> Array:
        y = np.empty(x.shape, np.float32)
        self._call("dspark_to_float", ctypes.c_int32(_CODES[x.dtype]), x, y, x.size)
        return y

    def masses(self, logits: Array, params: SamplingParams, threads: int = 64) -> tuple[Array, Array]:
        """Weights (before filters) and masses (after them) [vocab] of one row."""
        weights, masses = np.empty(logits.shape, np.float32), np.empty(logits.shape, np.uint64)
        code = ctypes.c_int32(_CODES[logits.dtype])
        inputs = sampling_inputs([params])
        block = ctypes.c_int32(threads)
        self._call("dspark_masses", code, logits, logits.size, _sampling(inputs), block, weights, masses)
        return weights, masses

    def draw(
        self, logits: Array, params: Sequence[SamplingParams], uniforms: Sequence[float], threads: int = 64
    ) -> Array:
        """Tokens [rows] for logits [rows, vocab]; -1 for a damaged row."""
        rows, vocab = logits.shape
        numbers, tokens = np.array(uniforms, np.float32), np.empty(rows, np.int64)
        code = ctypes.c_int32(_CODES[logits.dtype])
        inputs = sampling_inputs(params)
        block = ctypes.c_int32(threads)
        self._call("dspark_draw", code, logits, rows, vocab, _sampling(inputs), numbers, block, tokens)
        return tokens

    def verify_tree(self, inputs: dict[str, Array], threads: int = 64) -> tuple[Array, Array, Array]:
        """Outputs of the ONNX function VerifyTree for the same inputs."""
        logits = inputs["logits"]
        batch, rows, vocab = logits.shape
        path, emitted = np.empty((batch, rows), np.int64), np.empty((batch, rows), np.int64)
        accepted = np.empty(batch, np.int64)
        self._call(
            "dspark_verify_tree",
            ctypes.c_int32(_CODES[logits.dtype]),
            *(logits, inputs["tokens"], inputs["ancestors"], inputs["uniforms"], _sampling(inputs)),
            *(batch, rows, vocab, ctypes.c_int32(threads), path, emitted, accepted),
        )
        return path, emitted, accepted

    def verify_chain(self, inputs: dict[str, Array], threads: int = 64) -> tuple[Array, Array, Array]:
        """Outputs of the ONNX function VerifyChain for the same inputs."""
        logits = inputs["logits"]
        batch, rows, vocab = logits.shape
        path, emitted = np.empty((batch, rows), np.int64), np.empty((batch, rows), np.int64)
        accepted = np.empty(batch, np.int64)
        self._call(
            "dspark_verify_chain",
            ctypes.c_int32(_CODES[logits.dtype]),
            *(logits, inputs["tokens"], inputs["draft_probs"], inputs["drafted"]),
            *(inputs["accept_uniforms"], inputs["draw_uniforms"], _sampling(inputs)),
            *(batch, rows, vocab, ctypes.c_int32(threads), path, emitted, accepted),
        )
        return path, emitted, accepted

    def draft_block(self, kind: str, arrays: dict[str, Array], threads: int = 64) -> tuple[Array, Array, Array]:
        """Tokens [batch, drafts], probabilities [batch, drafts, vocab] and confidence logits [batch, drafts]."""
        batch, drafts, vocab = arrays["base_logits"].shape
        tokens = np.empty((batch, drafts), np.int64)
        probs = np.empty((batch, drafts, vocab), np.float32)
        confidences = np.full((batch, drafts), np.nan, np.float32)
        hidden = arrays["hidden_rows"].shape[-1]
        embeddings, rank = arrays["w1"].shape if "w1" in arrays else (0, 0)
        uses_token = "confidence" in arrays and arrays["confidence"].size > hidden
        names = ("base_logits", "hidden_rows", "anchors", "temperature", "uniforms", "w1", "w2", "mix", "mix_bias")
        draft = _Draft(
            *(batch, drafts, KINDS[kind], rank, hidden, vocab, embeddings, uses_token),
            *(_pointer(arrays.get(name)) for name in names),
            *(_pointer(arrays.get(name)) for name in ("confidence", "confidence_bias", "token_map")),
            *(_pointer(array) for array in (tokens, probs, confidences)),
        )
        code = ctypes.c_int32(_CODES[arrays["base_logits"].dtype])
        self._call("dspark_draft_block", code, ctypes.byref(draft), ctypes.c_int32(threads))
        return tokens, probs, confidences

    def compact_cache(self, caches: Sequence[Array], path: Array, accepted: Array, starts: Array) -> None:
        """Moves accepted rows of caches [batch, heads, capacity, row], in place."""
        data = np.array([_pointer(cache) for cache in caches], np.uint64)
        heads = np.array([cache.shape[1] for cache in caches], np.int64)
        sizes = np.array([cache.shape[3] * cache.itemsize for cache in caches], np.int64)
        batch, capacity = caches[0].shape[0], caches[0].shape[2]
        cache = _Cache(len(caches), batch, capacity, *(_pointer(array) for array in (data, heads, sizes)))
        self._call("dspark_compact_cache", ctypes.byref(cache), path, accepted, starts, path.shape[1])
