"""The ``target`` graph.

| input | dtype, shape | |
|---|---|---|
| input_ids | int64 [batch, tokens] | new tokens: a prompt chunk, or a tree with the anchor at row 0 |
| position_ids | int64 [batch, tokens] | true positions; siblings share one |
| attention_mask | bool [batch, 1, tokens, kv_len] | true = may attend |
| write_indices | int64 [batch] | first cache slot of the new rows |
| logit_rows | int64 [batch, rows] | rows whose logits are wanted |
| past_key_values.{i}.key / .value | dtype [batch, kv_heads, capacity, key_dim / value_dim] | the cache |

| output | dtype, shape | |
|---|---|---|
| logits | float32 [batch, rows, vocab] | after the model's own softcapping or scaling |
| hidden_taps | dtype [batch, tokens, taps * hidden] | only with ``taps``; raw layer outputs, -1 = embedding |
| present.{i}.key / .value | as past | the same memory as past: bind one buffer to both |

Absent on purpose: causality (the mask carries it, and the tree), sequence lengths, padding on the left, sampling,
logits of every row, and any operator outside the standard domain. Sliding windows are derived inside from true
positions, so the caller's mask is the same for all layers.

Rules for the caller: slots from ``kv_len`` on are never read, whatever they hold. Slots below it that the mask
hides must hold finite numbers: a masked weight is 0, and 0 times NaN is NaN in the kernels. Allocate the cache filled
with zeros. A row that pads a shorter sequence of a batch attends to itself, so that it has something to attend to.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
from transformers import PreTrainedModel

from dspark_export.graphs.decoder import EMBEDDING, DecoderTrace
from dspark_runtime.bundle.contract import decoder_contract
from dspark_runtime.errors import UsageError


def export_target(source: PreTrainedModel | DecoderTrace, *, taps: Sequence[int] = ()) -> ir.Model:
    """The target graph of a model (or of its trace, where several graphs are wanted); weights are referenced.

    Args:
        taps: layer numbers whose raw outputs ``hidden_taps`` concatenates, in ascending order; -1 is the embedding.

    Raises:
        UsageError: a tap that does not exist.
        UnsupportedArchitecture: the model's attention or cache does not fit the contract.
        ExportError: torch cannot trace the model.
    """
    trace = DecoderTrace.of(source)
    layers, wanted = tuple(range(len(trace.cache))), tuple(sorted(set(taps)))
    if any(tap not in (EMBEDDING, *layers) for tap in wanted):
        raise UsageError(f"taps {list(wanted)}: the model has layers 0 to {layers[-1]}, and -1 for the embedding")
    width = len(wanted) * trace.hidden_size
    contract = decoder_contract("target", trace.cache, trace.vocab_size, trace.dtype, taps_width=width)
    return trace.cut(contract, layers, wanted)
