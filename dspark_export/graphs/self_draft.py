"""The ``self_draft`` graph: some of the target's own layers, then its final norm and head.

Inputs and outputs are those of ``target``, except:

- ``past_key_values.{i}`` / ``present.{i}`` exist only for the layers it runs, under the *target's* layer numbers: bind
  the target's own cache. Committed slots hold what the target wrote; a draft pass writes its rows where the next
  verify pass overwrites them.
- there is no ``hidden_taps``.

Absent on purpose: separate weights (all initializers have the target's names and live in the target's data file)
and a separate cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
from transformers import PreTrainedModel

from dspark_export.graphs.decoder import DecoderTrace
from dspark_export.graphs.layer_choice import check_layers
from dspark_runtime.bundle.contract import decoder_contract


def export_self_draft(source: PreTrainedModel | DecoderTrace, layers: Sequence[int]) -> ir.Model:
    """The graph of a model (or of its trace) cut down to ``layers``, ascending target layer numbers.

    Raises:
        UsageError: ``layers`` is empty, out of range, repeats or is not ascending.
        UnsupportedArchitecture: the model's attention or cache does not fit the contract.
        ExportError: torch cannot trace the model.
    """
    trace = DecoderTrace.of(source)
    chosen = check_layers(layers, len(trace.cache))
    contract = decoder_contract("self_draft", trace.cache, trace.vocab_size, trace.dtype, layers=chosen)
    return trace.cut(contract, chosen)
