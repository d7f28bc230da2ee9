"""Graph rewrites, one per file, and the order they run in."""

from __future__ import annotations

import onnx_ir as ir

from dspark_runtime.bundle.draft_contract import BLOCK_POSITIONS


def optimize(model: ir.Model) -> ir.Model:
    """Fold what the tracer decomposed, in place; the graph stays standard operators only. Returns ``model``."""
    from dspark_export.passes.drop_noops import DropNoops
    from dspark_export.passes.fold_rms_norm import FoldRmsNorm
    from dspark_export.passes.fold_rotary import FoldRotary
    from dspark_export.passes.pack_projections import PackProjections

    ir.passes.Sequential(FoldRmsNorm(), FoldRotary(), DropNoops(), PackProjections())(model)
    return model


def for_ort_cpu(model: ir.Model, max_positions: int, *, any_batch: bool = False) -> ir.Model:
    """A variant of an optimized graph for ONNX Runtime on the CPU: a clone that shares every weight with ``model``.

    With ``any_batch`` the attention stays in the standard form, which takes several sequences in one pass.
    """
    from dspark_export.passes.drop_noops import DropNoops
    from dspark_export.passes.ort_cpu_attention import OrtCpuAttention
    from dspark_export.passes.ort_cpu_integer_products import OrtCpuIntegerProducts
    from dspark_export.passes.ort_cpu_skip_norm import OrtCpuSkipNorm
    from dspark_export.passes.widen_to_float32 import WidenToFloat32

    variant = model.clone()
    attention = () if any_batch else (OrtCpuAttention(max_positions),)
    rewrites = (*attention, OrtCpuSkipNorm(), OrtCpuIntegerProducts())
    ir.passes.Sequential(WidenToFloat32(), DropNoops(), *rewrites, DropNoops())(variant)
    return variant


def ort_cpu_variants(model: ir.Model, max_positions: int) -> dict[str, ir.Model]:
    """The variants worth shipping, by their name in the manifest.

    ``onnxruntime-cpu`` takes one sequence a pass. More sequences run the standard graph, unless that computes in half
    precision, which the CPU cannot, or expands weights of one scale an output in every pass: then there is
    ``onnxruntime-cpu-batch`` as well.
    """
    if any(value.name == BLOCK_POSITIONS for value in model.graph.inputs):
        # A block drafter's rows see each other in both directions, and are not all of the rows it appends: attention
        # stays in the standard form, for any number of sequences.
        variant = for_ort_cpu(model, max_positions, any_batch=True)
        return {"onnxruntime-cpu": variant, **({"onnxruntime-cpu-batch": variant} if _needs_variant(model) else {})}
    variants = {"onnxruntime-cpu": for_ort_cpu(model, max_positions)}
    if _needs_variant(model):
        variants["onnxruntime-cpu-batch"] = for_ort_cpu(model, max_positions, any_batch=True)
    return variants


def _needs_variant(model: ir.Model) -> bool:
    """Whether the standard graph is none that the CPU should run."""
    from dspark_export.passes.ort_cpu_integer_products import has_integer_products
    from dspark_export.passes.widen_to_float32 import is_half

    return is_half(model) or has_integer_products(model)
