"""Half-precision graphs on the CPU: stored narrow, computed wide."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from dspark_export import passes
from dspark_export.bundle.weights import save_graphs
from dspark_export.graphs.target import export_target
from tests import tiny_models
from tests.parity.harness import GraphRunner, Tree, assert_close, plain_logits


@pytest.mark.parametrize("arch", ["llama", "gemma3_text", "qwen3_moe"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_variants_compute_in_float32_from_narrow_weights(arch: str, dtype: torch.dtype, tmp_path: Path) -> None:
    _, model = tiny_models.make(arch, dtype=dtype, head_dim=16)
    standard = passes.optimize(export_target(model))
    variants = passes.ort_cpu_variants(standard, tiny_models.MAX_POSITIONS)
    assert set(variants) == {"onnxruntime-cpu", "onnxruntime-cpu-batch"}
    paths = save_graphs({"standard": standard, **variants}, tmp_path)
    prompt = [int(t) for t in np.random.default_rng(0).integers(3, tiny_models.VOCAB, 24)]
    wanted = plain_logits(model.float(), prompt)
    for name, batch in (("onnxruntime-cpu", 1), ("onnxruntime-cpu-batch", 2)):
        graph = variants[name].graph
        assert {v.dtype for v in (*graph.inputs, *graph.outputs)} <= {
            ir.DataType.FLOAT,
            ir.DataType.INT64,
            ir.DataType.BOOL,
        }
        stored = graph.initializers["lm_head.weight"]
        assert stored.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
        for logits in GraphRunner(paths[name], batch=batch).step([Tree.chain(prompt)] * batch):
            assert_close(logits, wanted)


def test_float32_graphs_need_no_batch_variant() -> None:
    _, model = tiny_models.make("llama")
    assert set(passes.ort_cpu_variants(passes.optimize(export_target(model)), 512)) == {"onnxruntime-cpu"}
