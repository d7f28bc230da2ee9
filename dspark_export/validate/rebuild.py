"""Clean graphs, exported again from the model the way the bundle's were, to compare weights and nodes with."""

from __future__ import annotations

import tempfile
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from dspark_export.build.calibrate import stored_calibration
from dspark_export.build.manifest import file_stem
from dspark_export.build.pipeline import DATA_FILE
from dspark_export.bundle.weights import save_graphs
from dspark_export.graphs.decoder import DecoderTrace
from dspark_export.graphs.self_draft import export_self_draft
from dspark_export.graphs.target import export_target
from dspark_export.passes import all_forms, optimize
from dspark_export.passes.packed_weights import load_plain
from dspark_export.passes.precision import PrecisionSettings, apply_precision
from dspark_runtime.bundle.files import BundleFiles
from dspark_runtime.bundle.manifest import GraphEntry

if TYPE_CHECKING:
    import onnx_ir as ir
    from transformers import PreTrainedModel

    from dspark_export.checkpoints import Checkpoint


class Rebuilt:
    """Exports the target and the self-draft of a bundle once more, when first asked; files go when this is closed.

    ``model`` has the element type of the bundle's standard graphs.
    """

    def __init__(self, files: BundleFiles, model: PreTrainedModel, checkpoint: Checkpoint) -> None:
        self._files, self._model, self._checkpoint = files, model, checkpoint
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._plain: dict[str, npt.NDArray[Any]] = {}

    @cached_property
    def graphs(self) -> dict[str, ir.Model]:
        """Standard graphs by name, weights as the bundle should store them."""
        trace = DecoderTrace(self._model)
        graphs = {"target": export_target(trace, taps=self._files.graph("target").taps)}
        if self._files.has_graph("self_draft"):
            graphs["self_draft"] = export_self_draft(trace, self._files.graph("self_draft").layers or ())
        stored = self._files.manifest.precision
        settings = PrecisionSettings(stored.weights, stored.block_size, head=stored.head, embedding=stored.embedding)
        kept = self._checkpoint.kept_weights(self._model, minima=self._has_kernels) if stored.kind.kept else None
        for graph in graphs.values():
            optimize(graph, kept)
        calibration = stored_calibration(
            load_plain(self._files.path(self._files.graph("target").file)), graphs["target"]
        )
        if calibration is not None:
            calibration.apply(graphs)
        self._plain = tensors(graphs["target"])
        for graph in graphs.values():
            apply_precision(graph, settings, kept)
        return graphs

    def plain_weights(self) -> dict[str, npt.NDArray[Any]]:
        """Weights of the target by name, before quantization."""
        _ = self.graphs
        return self._plain

    def graph(self, entry: GraphEntry) -> Path:
        """File of the clean graph in the same form."""
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="dspark-clean-")
            self._save(Path(self._folder.name) / "onnx")
        return Path(self._folder.name) / "onnx" / f"{file_stem(entry.name, entry.variant)}.onnx"

    @property
    def _has_kernels(self) -> bool:
        return any(graph.variant == "sequence-kernels" for graph in self._files.manifest.graphs)

    def close(self) -> None:
        """Remove the files."""
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _save(self, folder: Path) -> None:
        manifest = self._files.manifest
        graphs = {name: graph.clone() for name, graph in self.graphs.items()}
        forms = all_forms(graphs, manifest.model.max_positions, kernels=self._has_kernels)
        folder.mkdir()
        save_graphs({file_stem(name, variant): graph for name, variant, graph in forms}, folder, DATA_FILE)


def tensors(graph: ir.Model) -> dict[str, npt.NDArray[Any]]:
    """Every initializer by name, without copying."""
    return {
        name: value.const_value.numpy()
        for name, value in graph.graph.initializers.items()
        if value.const_value is not None
    }
