"""Graph rewrites, one per file, and the order they run in."""

from __future__ import annotations

import onnx_ir as ir


def optimize(model: ir.Model) -> ir.Model:
    """Fold what the tracer decomposed, in place; the graph stays standard operators only. Returns ``model``."""
    from dspark_export.passes.drop_noops import DropNoops
    from dspark_export.passes.fold_rms_norm import FoldRmsNorm
    from dspark_export.passes.fold_rotary import FoldRotary
    from dspark_export.passes.pack_projections import PackProjections

    ir.passes.Sequential(FoldRmsNorm(), FoldRotary(), DropNoops(), PackProjections())(model)
    return model


def for_ort_cpu(model: ir.Model, max_positions: int) -> ir.Model:
    """The ``onnxruntime-cpu`` variant of an optimized graph: a clone that shares every weight with ``model``."""
    from dspark_export.passes.drop_noops import DropNoops
    from dspark_export.passes.ort_cpu_attention import OrtCpuAttention
    from dspark_export.passes.ort_cpu_skip_norm import OrtCpuSkipNorm

    variant = model.clone()
    ir.passes.Sequential(OrtCpuAttention(max_positions), OrtCpuSkipNorm(), DropNoops())(variant)
    return variant
