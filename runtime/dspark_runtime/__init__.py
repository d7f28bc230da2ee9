"""Run time of dspark-export: opens a bundle and generates text with speculative decoding.

Imports neither torch nor transformers nor onnx. Names load on first use, so that reading a manifest needs no backend.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dspark_runtime.api import Bundle
    from dspark_runtime.decoding.sequence import Chunk, Generation
    from dspark_runtime.decoding.statistics import Statistics
    from dspark_runtime.decoding.stream import Stream
    from dspark_runtime.drafters.base import Draft, Drafter, DraftRequest
    from dspark_runtime.drafters.choice import SPECULATION_MODES
    from dspark_runtime.drafters.parts import DraftOptions
    from dspark_runtime.errors import DsparkError
    from dspark_runtime.phrases.store import PhraseOptions
    from dspark_runtime.serving.handle import Handle
    from dspark_runtime.serving.options import ServiceOptions
    from dspark_runtime.serving.service import Service
    from dspark_runtime.speculation.sampling import SamplingParams
    from dspark_runtime.speculation.tree import TokenTree

_PLACES = {
    "SPECULATION_MODES": "drafters.choice",
    "Bundle": "api",
    "Chunk": "decoding.sequence",
    "Draft": "drafters.base",
    "DraftOptions": "drafters.parts",
    "DraftRequest": "drafters.base",
    "Drafter": "drafters.base",
    "DsparkError": "errors",
    "Generation": "decoding.sequence",
    "Handle": "serving.handle",
    "PhraseOptions": "phrases.store",
    "SamplingParams": "speculation.sampling",
    "Service": "serving.service",
    "ServiceOptions": "serving.options",
    "Statistics": "decoding.statistics",
    "Stream": "decoding.stream",
    "TokenTree": "speculation.tree",
}

__all__ = [
    "SPECULATION_MODES",
    "Bundle",
    "Chunk",
    "Draft",
    "DraftOptions",
    "DraftRequest",
    "Drafter",
    "DsparkError",
    "Generation",
    "Handle",
    "PhraseOptions",
    "SamplingParams",
    "Service",
    "ServiceOptions",
    "Statistics",
    "Stream",
    "TokenTree",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"dspark_runtime.{_PLACES[name]}"), name)
