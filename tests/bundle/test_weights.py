"""Writing graphs: weights stored once, aligned, streamed, readable; memory near one copy of the weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnx_ir.tensor_adapters import TorchTensor
from transformers import PreTrainedModel

from dspark_export.bundle.weights import ALIGNMENT, INLINE_BYTES, save_graphs
from dspark_export.graphs.decoder import DecoderTrace
from dspark_export.graphs.self_draft import export_self_draft
from dspark_export.graphs.target import export_target
from tests import tiny_models


def places(path: Path) -> dict[str, tuple[int, int]]:
    """Offset and length in the data file of every external initializer of a saved graph."""
    found = {}
    for tensor in onnx.load(path, load_external_data=False).graph.initializer:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        if entries:
            assert entries["location"] == "weights.data"
            found[tensor.name] = (int(entries["offset"]), int(entries["length"]))
        else:
            assert len(tensor.raw_data) <= INLINE_BYTES
    return found


def both(model: PreTrainedModel, folder: Path) -> dict[str, Path]:
    trace = DecoderTrace(model)
    return save_graphs({"target": export_target(trace), "self_draft": export_self_draft(trace, (0, 2))}, folder)


@pytest.mark.parametrize("arch", ["llama", "qwen3", "mixtral", "deepseek_v3"])
def test_every_weight_lies_in_the_file_once(arch: str, tmp_path: Path) -> None:
    _, model = tiny_models.make(arch)
    paths = both(model, tmp_path)
    target, draft = places(paths["target"]), places(paths["self_draft"])
    assert set(draft) < set(target)
    assert all(target[name] == place for name, place in draft.items())
    distinct = set(target.values())
    assert all(offset % ALIGNMENT == 0 for offset, _ in distinct)
    stored = sum(length for _, length in distinct)
    weights = sum(
        p.numel() * p.element_size() for p in model.parameters() if p.numel() * p.element_size() > INLINE_BYTES
    )
    assert weights <= stored <= weights + 4096
    assert (tmp_path / "weights.data").stat().st_size <= stored + ALIGNMENT * len(distinct)


def test_tied_embedding_and_head_share_one_copy(tmp_path: Path) -> None:
    _, model = tiny_models.make("qwen3")
    assert model.config.tie_word_embeddings
    names = places(both(model, tmp_path)["target"])
    embedding = model.get_input_embeddings().weight
    assert [length for _, length in names.values()].count(embedding.numel() * 4) == 1


def test_weights_keep_their_checkpoint_names_and_values(tmp_path: Path) -> None:
    _, model = tiny_models.make("llama")
    paths = both(model, tmp_path)
    state, data = model.state_dict(), (tmp_path / "weights.data").read_bytes()
    for name, (offset, length) in places(paths["target"]).items():
        stored = np.frombuffer(data[offset : offset + length], np.float32)
        weight = state[name].numpy()
        assert np.array_equal(stored, (weight.T if weight.ndim == 2 and "embed" not in name else weight).ravel()), name


def test_equal_content_is_shared_even_between_different_tensors(tmp_path: Path) -> None:
    graphs = {}
    for name in ("one", "two"):
        weight = torch.arange(4096, dtype=torch.float32)
        value = ir.Value(name="w", const_value=TorchTensor(weight, name="w"), shape=ir.Shape([4096]))
        x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([4096]))
        node = ir.node("Add", [x, value])
        node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT)
        graph = ir.Graph([x], node.outputs, nodes=[node], initializers=[value], opset_imports={"": 24}, name=name)
        graphs[name] = ir.Model(graph, ir_version=11)
    paths = save_graphs(graphs, tmp_path)
    assert (tmp_path / "weights.data").stat().st_size == 4096 * 4
    for path in paths.values():
        (y,) = ort.InferenceSession(path).run(None, {"x": np.zeros(4096, np.float32)})
        assert np.array_equal(y, np.arange(4096, dtype=np.float32))
    assert graphs["one"].graph.initializers["w"].const_value is not None


def test_no_graph_names_the_machine_it_was_made_on(tmp_path: Path) -> None:
    _, model = tiny_models.make("qwen3")
    for path in both(model, tmp_path).values():
        assert b"site-packages" not in path.read_bytes()
        assert path.stat().st_size < 200_000


def test_models_are_left_as_they_were(tmp_path: Path) -> None:
    _, model = tiny_models.make("olmo2")
    graph = export_target(model)
    for folder in ("a", "b"):
        save_graphs({"target": graph}, tmp_path / folder)
    assert (tmp_path / "a" / "target.onnx").read_bytes() == (tmp_path / "b" / "target.onnx").read_bytes()
    assert (tmp_path / "a" / "weights.data").read_bytes() == (tmp_path / "b" / "weights.data").read_bytes()


MEMORY_PROBE = """
import json, resource, sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM, LlamaConfig
from dspark_export.graphs.decoder import DecoderTrace
from dspark_export.bundle.weights import save_graphs
from dspark_export.graphs.self_draft import export_self_draft
from dspark_export.graphs.target import export_target
from tests import tiny_models

peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
small = tiny_models.make("llama")[1]
save_graphs({"target": export_target(small)}, Path(sys.argv[1]) / "warm-up")
config = LlamaConfig(hidden_size=1024, intermediate_size=8192, num_hidden_layers=int(sys.argv[3]), vocab_size=32000,
                     num_attention_heads=8, num_key_value_heads=4, tie_word_embeddings=False)
with torch.device("meta"):
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, sys.argv[2]))
model.to_empty(device="cpu")
with torch.no_grad():
    for seed, parameter in enumerate(model.parameters()):
        parameter.copy_(torch.tensor(float(seed)))
        parameter.view(-1)[::1001] = 1.5
model.model.rotary_emb.inv_freq.fill_(1.0)
weights = sum(p.numel() * p.element_size() for p in model.parameters())
before = peak()
trace = DecoderTrace(model.eval().requires_grad_(False))
graphs = {"target": export_target(trace), "self_draft": export_self_draft(trace, (0, 1))}
save_graphs(graphs, Path(sys.argv[1]) / "out")
print(json.dumps({"weights": weights, "before": before, "after": peak()}))
"""


def measured_peak(folder: Path, dtype: str, layers: int) -> dict[str, int]:
    done = subprocess.run(
        [sys.executable, "-c", MEMORY_PROBE, str(folder), dtype, str(layers)],
        capture_output=True,
        text=True,
        check=True,
    )
    figures: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return figures


def test_exporting_needs_little_memory_beyond_the_weights(tmp_path: Path) -> None:
    figures = measured_peak(tmp_path, "float32", 2)
    assert figures["weights"] > 400e6
    assert figures["after"] - figures["before"] < 0.25 * figures["weights"], figures
    size = (tmp_path / "out" / "weights.data").stat().st_size
    assert size < 1.01 * figures["weights"]


@pytest.mark.slow
def test_models_over_two_gigabytes(tmp_path: Path) -> None:
    """Offsets beyond 2**31, and ONNX Runtime reading from there."""
    figures = measured_peak(tmp_path, "float32", 20)
    assert figures["weights"] > 2.2e9
    assert figures["after"] - figures["before"] < 0.25 * figures["weights"], figures
    found = places(tmp_path / "out" / "target.onnx")
    assert max(offset for offset, _ in found.values()) > 1 << 31
    session = ort.InferenceSession(tmp_path / "out" / "target.onnx")
    assert session.get_outputs()[0].name == "logits"
