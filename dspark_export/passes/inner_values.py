"""Inner values of a block drafter's graph: outputs while it is traced and rewritten, so that they keep their names."""

from __future__ import annotations

import onnx_ir as ir

from dspark_runtime.bundle.draft_contract import BASE_LOGITS, BLOCK_HIDDEN, CORRECTED_LOGITS, CTX_FEATURES

_INNER = (CTX_FEATURES, BLOCK_HIDDEN, BASE_LOGITS, CORRECTED_LOGITS, "ctx_keys.", "ctx_values.")


def hide_inner_values(model: ir.Model) -> ir.Model:
    """Make the inner values plain values again, under their names; returns ``model``. Nothing else changes."""
    model.graph.outputs[:] = [value for value in model.graph.outputs if not (value.name or "").startswith(_INNER)]
    return model
