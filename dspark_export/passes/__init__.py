"""Graph rewrites, one per file, and the order they run in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import cast

import onnx_ir as ir

from dspark_export.passes.drop_noops import DropNoops
from dspark_export.passes.fold_rms_norm import FoldRmsNorm
from dspark_export.passes.fold_rotary import FoldRotary
from dspark_export.passes.kept_weights import KeptWeights
from dspark_export.passes.kernel_attention import KernelAttention
from dspark_export.passes.kernel_draft import KernelDraft
from dspark_export.passes.kernel_products import KernelProducts
from dspark_export.passes.kernel_rows import KernelRows
from dspark_export.passes.ort_cpu_attention import OrtCpuAttention
from dspark_export.passes.ort_cpu_integer_products import OrtCpuIntegerProducts, has_integer_products
from dspark_export.passes.ort_cpu_skip_norm import OrtCpuSkipNorm
from dspark_export.passes.pack_projections import PackProjections
from dspark_export.passes.packed_weights import PackedWeights, ReadPackedWeights
from dspark_export.passes.widen_to_float32 import WidenToFloat32, is_half
from dspark_runtime.backends.ort_kernels import DOMAIN
from dspark_runtime.bundle.draft_contract import BLOCK_POSITIONS
from dspark_runtime.bundle.manifest import Variant

# Operators that ONNX Runtime may round differently for another number of rows.
_ARITHMETIC = {
    "Attention", "Cos", "Einsum", "Erf", "Exp", "Gelu", "Gemm", "LayerNormalization", "Loop", "MatMul", "Pow",
    "ReduceMean", "RMSNormalization", "RotaryEmbedding", "Sigmoid", "Sin", "Softplus", "Tanh",
}  # fmt: skip


def optimize(model: ir.Model, kept: KeptWeights | None = None) -> ir.Model:
    """Fold what the tracer decomposed, in place; the graph stays standard operators only. Returns ``model``.

    Of ``kept`` weights, only those stored in the same way are packed together.
    """
    pack = PackProjections(alike=None if kept is None else kept.alike)
    ir.passes.Sequential(FoldRmsNorm(), FoldRotary(), DropNoops(), pack)(model)
    return model


def for_ort_cpu(model: ir.Model, max_positions: int, *, any_batch: bool = False) -> ir.Model:
    """A variant of an optimized graph for ONNX Runtime on the CPU: a clone that shares every weight with ``model``.

    With ``any_batch`` the attention stays in the standard form, which takes several sequences in one pass.
    """
    variant = model.clone()
    attention = () if any_batch else (OrtCpuAttention(max_positions),)
    rewrites = (*attention, OrtCpuSkipNorm(), OrtCpuIntegerProducts())
    ir.passes.Sequential(WidenToFloat32(), DropNoops(), *rewrites, DropNoops())(variant)
    return variant


def for_kernels(model: ir.Model, max_positions: int, weights: PackedWeights) -> ir.Model:
    """A variant of an optimized graph for the sequence kernels: a clone whose weights are packed into ``weights``.

    It takes any number of sequences. Where an operator has no kernel, the standard form stays.
    """
    # onnxscript: only when a graph gets the sequence kernels
    from dspark_export.passes.kernel_functions import add_kernel_functions

    variant = model.clone()
    rewrites = (KernelAttention(max_positions), KernelRows(), KernelProducts(weights), KernelDraft())
    ir.passes.Sequential(WidenToFloat32(), DropNoops(), *rewrites, DropNoops())(variant)
    return add_kernel_functions(variant)


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


def all_forms(
    graphs: Mapping[str, ir.Model], max_positions: int, *, kernels: bool
) -> list[tuple[str, Variant, ir.Model]]:
    """(name, variant, graph) of every form that a bundle ships of ``graphs``.

    With ``kernels`` there is one for the sequence kernels, and every form reads its weights in their layout: the graphs
    themselves, which are the standard forms, are changed for that.
    """
    forms: list[tuple[str, Variant, ir.Model]] = []
    weights = PackedWeights()
    for name, graph in graphs.items():
        forms += [(name, cast("Variant", key), model) for key, model in ort_cpu_variants(graph, max_positions).items()]
        if kernels:
            forms.append((name, "sequence-kernels", for_kernels(graph, max_positions, weights)))
    forms += [(name, "standard", graph) for name, graph in graphs.items()]
    for _, variant, graph in forms:
        if variant != "sequence-kernels":
            ReadPackedWeights(weights)(graph)
    return forms


def kernels_of(model: ir.Model) -> tuple[str, ...]:
    """Names of the sequence kernels that ``model`` calls."""
    # onnxscript: only when finished graphs are described
    from dspark_export.passes.kernel_functions import kernel_names

    called = {node.op_type for graph in model.graphs() for node in graph if node.domain == DOMAIN}
    return tuple(sorted(called & kernel_names()))


def without_kernel(model: ir.Model) -> dict[str, int]:
    """How many nodes are left of each operator that may round differently for another number of rows."""
    found = Counter(node.op_type for node in model.graph if node.domain != DOMAIN and node.op_type in _ARITHMETIC)
    return dict(sorted(found.items()))


def _needs_variant(model: ir.Model) -> bool:
    """Whether the CPU needs its own variant of the standard graph."""
    return is_half(model) or has_integer_products(model)
