"""The ``self_draft`` graph: some of the target's own layers, then its final norm and head.

Inputs and outputs are those of ``target``, except:

- ``past_key_values.{i}`` / ``present.{i}`` exist only for the layers it runs, under the *target's* layer numbers: bind
  the target's own cache. Committed slots hold what the target wrote; the rows a draft pass writes lie where the next
  verify pass overwrites them.
- there is no ``hidden_taps``.

Absent on purpose: weights of its own (all initializers have the target's names and live in the target's data file)
and a cache of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
from dspark_runtime.contract import decoder_contract
from transformers import PreTrainedModel

from dspark_export.graphs.decoder import Decoder, dtype_name, traceable, vocab_size
from dspark_export.graphs.layer_choice import check_layers
from dspark_export.tracing.example import example_inputs
from dspark_export.tracing.geometry import probe
from dspark_export.tracing.to_onnx import trace


def export_self_draft(model: PreTrainedModel, layers: Sequence[int]) -> ir.Model:
    """The graph of ``model`` cut down to ``layers`` (ascending target layer numbers); weights are referenced.

    Raises:
        UsageError: ``layers`` is empty, out of range, repeats or is not ascending.
        UnsupportedArchitecture: the model's attention or cache does not fit the contract.
        ExportError: torch cannot trace the model.
    """
    cache = probe(model.config)
    chosen = check_layers(layers, len(cache))
    contract = decoder_contract("self_draft", cache, vocab_size(model), dtype_name(model), layers=chosen)
    with traceable(model, chosen):
        return trace(Decoder(model, chosen), contract, example_inputs(contract))
