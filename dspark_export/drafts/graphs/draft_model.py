"""The graph of an independent language model that drafts: inputs and outputs of ``target``, under its own name.

It has its own weights and cache and no ``hidden_taps``; see :mod:`dspark_export.graphs.target`.
"""

from __future__ import annotations

import onnx_ir as ir
from transformers import PreTrainedModel

from dspark_export.graphs.decoder import DecoderTrace
from dspark_runtime.bundle.contract import decoder_contract


def export_draft_model(source: PreTrainedModel | DecoderTrace, *, name: str) -> ir.Model:
    """The graph of a model (or of its trace), called ``name``; weights are referenced.

    Raises:
        UnsupportedArchitecture: the model's attention or cache does not fit the contract.
        ExportError: torch cannot trace the model.
    """
    trace = DecoderTrace.of(source)
    contract = decoder_contract(name, trace.cache, trace.vocab_size, trace.dtype)
    return trace.cut(contract, tuple(range(len(trace.cache))))
