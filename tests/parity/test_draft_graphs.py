"""What drafters' graphs share with the target's, and what all of them must look like."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from transformers import PreTrainedModel

from dspark_export.bundle.weights import save_graphs
from dspark_export.drafts.formats.draft import DraftCheckpoint, DraftLayers, EagleConfig, Rope
from dspark_export.drafts.graphs.block import block_module, export_block_drafter
from dspark_export.drafts.graphs.draft_model import export_draft_model
from dspark_export.drafts.graphs.eagle3 import eagle_modules, export_eagle3
from dspark_export.graphs.target import export_target
from dspark_export.passes import optimize, ort_cpu_variants
from dspark_export.passes.inner_values import hide_inner_values
from dspark_export.passes.precision import PrecisionSettings, apply_precision
from dspark_export.tracing.geometry import probe
from dspark_runtime.bundle.contract import GraphContract, decoder_contract
from dspark_runtime.bundle.precisions import Weights
from tests import tiny_models
from tests.drafts.writers import Sizes, eagle_tensors
from tests.parity.harness import GraphRunner, Tree, plain_logits
from tests.references.draft_samples import random_block

SIZES = Sizes(vocab=tiny_models.VOCAB)


def eagle() -> DraftCheckpoint:
    layers = DraftLayers(
        "qwen3",
        1,
        SIZES.hidden,
        SIZES.inner,
        SIZES.heads,
        SIZES.kv_heads,
        SIZES.head_dim,
        1e-6,
        "silu",
        False,
        Rope(SIZES.theta),
        (None,),
        SIZES.positions,
        scale=SIZES.head_dim**-0.5,
    )
    config = EagleConfig(layers, SIZES.taps, 7, SIZES.vocab, SIZES.vocab, False)
    return DraftCheckpoint("random", "classic", Path("."), config, eagle_tensors(SIZES))


def drafts_of(model: PreTrainedModel) -> dict[str, ir.Model]:
    """A block drafter and an EAGLE-3 drafter of ``model``."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    block, _ = random_block(hidden=SIZES.hidden, vocab=SIZES.vocab)
    made = {"block": export_block_drafter(block, embedding=embedding, head=head, name="block", dtype="float32")}
    return made | export_eagle3(eagle(), embedding=embedding, head=head, name="eagle", dtype="float32")


def stored(graphs: dict[str, ir.Model], folder: Path) -> int:
    """Bytes of the weight file of all forms of ``graphs``."""
    forms = {name: hide_inner_values(graph) for name, graph in graphs.items()}
    for name, graph in graphs.items():
        forms |= {f"{name}.{key}": hide_inner_values(v) for key, v in ort_cpu_variants(graph, 512).items()}
    save_graphs(forms, folder)
    return (folder / "weights.data").stat().st_size


@pytest.mark.parametrize("weights", ["fp32", "int8"])
@pytest.mark.parametrize("arch", ["llama", "qwen3"], ids=["untied", "tied"])
def test_embedding_and_head_are_stored_once(arch: str, weights: Weights, tmp_path: Path) -> None:
    """What drafters add to the weight file is smaller than one table of the target."""
    _, model = tiny_models.make(arch)
    target = {"target": export_target(model)}
    drafts = drafts_of(model)
    for graph in (target | drafts).values():
        optimize(graph)
        apply_precision(graph, PrecisionSettings(weights, block_size=32))
    alone, together = stored(target, tmp_path / "1"), stored(target | drafts, tmp_path / "2")
    own = {
        (name, value.const_value.tobytes()): value.const_value.nbytes
        for graph in drafts.values()
        for name, value in graph.graph.initializers.items()
        if value.const_value is not None and value.const_value.nbytes > 1024
        if name is not None and not name.startswith(("embed_tokens.", "lm_head."))
    }
    room = sum(-(-size // 4096) * 4096 for size in own.values()) + 4096 * len(own)  # tables of rotations, alignment
    assert own and together - alone <= room
    tables = places(tmp_path / "2")
    assert any(name.startswith("embed_tokens.") for name in tables)
    assert {name: at for name, at in tables.items() if len(at) > 1} == {}


def places(folder: Path) -> dict[str, set[str]]:
    """Where in the weight file the parts of the embedding and the head are, by name, over all graphs in ``folder``."""
    found: dict[str, set[str]] = {}
    for file in folder.glob("*.onnx"):
        for tensor in onnx.load(file, load_external_data=False).graph.initializer:
            offset = [entry.value for entry in tensor.external_data if entry.key == "offset"]
            if offset and tensor.name.startswith(("embed_tokens.", "lm_head.")):
                found.setdefault(tensor.name, set()).add(offset[0])
    return found


def check_contract(graph: ir.Graph, contract: GraphContract) -> None:
    names = {"float32": "float", "int64": "int64", "bool": "bool", "bfloat16": "bfloat16"}
    for values, specs in ((graph.inputs, contract.inputs), (graph.outputs, contract.outputs)):
        assert [value.name for value in values] == [spec.name for spec in specs]
        for value, spec in zip(values, specs, strict=True):
            assert value.shape is not None and value.dtype is not None
            assert value.dtype.name.lower() == names[spec.dtype], spec.name
            assert tuple(d.value if isinstance(d, ir.SymbolicDim) else d for d in value.shape) == spec.shape


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_graphs_keep_to_their_contracts(dtype: str) -> None:
    """Standard operators, names, types and shapes, before and after optimizing; half precision in and out."""
    table = torch.randn(SIZES.vocab, SIZES.hidden).to(getattr(torch, dtype))
    block, _ = random_block(hidden=SIZES.hidden, vocab=SIZES.vocab)
    options = {"embedding": table, "head": table, "name": "draft", "dtype": dtype}
    _, block_contract = block_module(block, **options)  # type: ignore[arg-type]
    wanted = [(export_block_drafter(block, **options), block_contract)]  # type: ignore[arg-type]
    graphs = export_eagle3(eagle(), **options)  # type: ignore[arg-type]
    wanted += [(graphs[contract.name], contract) for _, contract in eagle_modules(eagle(), **options)]  # type: ignore[arg-type]
    for model, contract in wanted:
        for _ in range(2):
            check_contract(model.graph, contract)
            assert {node.domain for node in model.graph} == {""} and not model.functions
            optimize(model)
        kinds = [node.op_type for node in model.graph]
        assert kinds.count("Attention") * 2 == kinds.count("TensorScatter") == kinds.count("RotaryEmbedding")
        assert "ReduceMean" not in kinds and "Neg" not in kinds


def test_steps_of_eagle_run_the_kernel_that_reads_the_cache_in_place() -> None:
    table = torch.randn(SIZES.vocab, SIZES.hidden)
    for graph in export_eagle3(eagle(), embedding=table, head=table, name="e", dtype="float32").values():
        kinds = [node.op_type for node in ort_cpu_variants(optimize(graph), 512)["onnxruntime-cpu"].graph]
        assert "GroupQueryAttention" in kinds and "TensorScatter" not in kinds


@pytest.mark.parametrize("variant", ["standard", "onnxruntime-cpu"])
def test_a_draft_model_says_what_it_says_alone(variant: str, tmp_path: Path) -> None:
    config, model = tiny_models.make("llama")
    graph = optimize(export_draft_model(model, name="small"))
    check_contract(graph.graph, decoder_contract("small", probe(config), tiny_models.VOCAB, "float32"))
    assert graph.graph.name == "small"
    if variant != "standard":
        graph = ort_cpu_variants(graph, 512)[variant]
    runner = GraphRunner(save_graphs({"small": graph}, tmp_path)["small"], 1)
    text = np.random.default_rng(0).integers(3, tiny_models.VOCAB, 20).tolist()
    wanted = plain_logits(model, text)
    for start, end in ((0, 11), (11, 12), (12, 20)):
        tree = Tree.chain(text[start:end])
        np.testing.assert_allclose(runner.step([tree])[0], wanted[start:end], rtol=0, atol=1e-4)
        runner.commit(0, tree, end - start - 1)
