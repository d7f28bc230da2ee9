"""Half-precision graphs of tiny models, saved as a build saves them, without the rest of a build."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import torch

from dspark_export.build.manifest import graph_entry
from dspark_export.bundle.weights import save_graphs
from dspark_export.engines.compile import compile_entry
from dspark_export.engines.options import CompileOptions, Ranges
from dspark_export.graphs.decoder import DecoderTrace
from dspark_export.graphs.self_draft import export_self_draft
from dspark_export.graphs.target import export_target
from dspark_export.passes import optimize
from dspark_runtime.bundle.engine_entry import EngineEntry
from dspark_runtime.bundle.files import GRAPH_DIR, sha256_of
from dspark_runtime.bundle.manifest import GraphEntry
from tests import tiny_models

RANGES = Ranges(batch=2, max_length=128, verify_rows=8, chunk=32)
OPTIONS = CompileOptions(ranges=RANGES)
HEADS: dict[str, dict[str, int]] = {
    "llama": {"head_dim": 16},
    "qwen3": {"head_dim": 32},
    "gemma3_text": {"head_dim": 16},
    "qwen3_moe": {"head_dim": 16},
    "deepseek_v3": {},
    "gpt_oss": {"head_dim": 16},
}
"""Architectures that engines are compiled of, with head widths that fused kernels exist for."""

DTYPES = {"qwen3": torch.bfloat16}
"""Element type of the graphs where it is not float16."""


@dataclass(frozen=True)
class Saved:
    """A folder with graphs, and their entries by name."""

    folder: Path
    graphs: dict[str, GraphEntry]

    def compile(self, name: str, options: CompileOptions = OPTIONS) -> EngineEntry:
        """The engine of graph ``name``, by the real compiler."""
        entry = self.graphs[name]
        digest = sha256_of(self.folder / entry.file)
        return compile_entry(self.folder, entry, digest, options, lambda graph, phase, step, steps: None)


def save(
    folder: Path, graphs: dict[str, ir.Model], dtype: str = "float16", layers: tuple[int, ...] | None = None
) -> Saved:
    """Write ``graphs`` as a build does."""
    save_graphs(graphs, folder / GRAPH_DIR)
    entries = {
        name: graph_entry(name, "standard", graph, folder / GRAPH_DIR, dtype, layers if name == "self_draft" else None)
        for name, graph in graphs.items()
    }
    return Saved(folder, entries)


def decoder_graphs(arch: str, folder: Path, overrides: dict[str, int] | None = None) -> Saved:
    """Target and self-draft of a tiny model with two layers."""
    settings = {"num_hidden_layers": 2, **_two_layers(arch), **HEADS[arch], **(overrides or {})}
    dtype = DTYPES.get(arch, torch.float16)
    _, model = tiny_models.make(arch, dtype=dtype, **settings)
    trace = DecoderTrace(model)
    graphs = {"target": export_target(trace), "self_draft": export_self_draft(trace, (1,))}
    for graph in graphs.values():
        optimize(graph)
    return save(folder, graphs, str(dtype).removeprefix("torch."), (1,))


def _two_layers(arch: str) -> dict[str, list[str]]:
    return {"layer_types": ["sliding_attention", "full_attention"]} if arch == "gemma3_text" else {}
