"""A bundle's graph in the form an engine is compiled from, and the facts to check the engine against."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import onnx
import onnx_ir as ir

from dspark_export.engines.options import Bounds, Profile, Ranges
from dspark_export.engines.plugin_forms import INLINED, Plugins, apply_plugins
from dspark_export.passes.draw_for_all import DrawForAll
from dspark_export.passes.equal_attention_widths import EqualAttentionWidths
from dspark_export.passes.gather_experts import GatherExperts
from dspark_export.passes.packed_weights import load_plain
from dspark_export.passes.pin_capacity import CAPACITY, PinCapacity
from dspark_runtime.bundle.contract import PAST, PRESENT, VERIFY
from dspark_runtime.bundle.manifest import GraphEntry
from dspark_runtime.bundle.precisions import BLOCKED, HALF, listed
from dspark_runtime.errors import EngineBuildError, EnginePrecisionError

PROFILES: tuple[Profile, ...] = ("decode", "prefill")


@dataclass(frozen=True)
class NodeFacts:
    """An ONNX node by name: its operator and the tensors it makes."""

    operator: str
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class PreparedGraph:
    """An ONNX file ready for the compiler.

    ``shapes[profile][input]`` are smallest, typical and largest shape. ``attention`` are the names of the attention
    nodes, ``caches`` maps every cache output to its input. ``nodes`` explain names in the compiler's messages.
    ``plugins`` are the versions of the plugins it uses, by name.
    """

    name: str
    path: Path
    dims: dict[Profile, dict[str, Bounds]]
    shapes: dict[Profile, dict[str, list[list[int]]]]
    attention: tuple[str, ...]
    caches: dict[str, str]
    nodes: dict[str, NodeFacts]
    plugins: dict[str, str] = field(default_factory=dict)


def prepare(
    entry: GraphEntry,
    bundle: Path,
    ranges: Ranges,
    to: Path,
    *,
    plugins: Plugins = INLINED,
    vocab: int | None = None,
) -> PreparedGraph:
    """Write the engine's form of the bundle's graph to ``to``, which must lie beside the bundle's weights.

    Weights that are packed in the bundle are written plainly to :func:`data_of`.

    ``plugins`` is the form of verification; ``vocab`` the width of logits, where it is an input's dimension.

    Raises:
        EnginePrecisionError: the graph computes in float32.
        EngineBuildError: it has a dimension no range is known for.
    """
    check_precision(entry)
    model = load_plain(bundle / entry.file)
    used = apply_plugins(model, plugins.form) if entry.name == VERIFY else {}
    ir.passes.Sequential(GatherExperts(), DrawForAll(), EqualAttentionWidths(), PinCapacity(ranges.max_length))(model)
    _save(model, to)
    fixed: dict[str, Bounds] = {} if vocab is None else {"vocab": (vocab, vocab, vocab)}
    dims = {profile: _used(ranges.dims(profile) | fixed, entry) for profile in PROFILES}
    # A graph that neither chunks a prompt nor reads its features has one profile.
    if not {"tokens", "features"} & set(dims["prefill"]):
        del dims["prefill"]
    outputs = [spec.name for spec in entry.outputs if spec.name.startswith(PRESENT)]
    return PreparedGraph(
        entry.name,
        to,
        dims,
        {profile: {i.name: _bounds(i.shape, sizes) for i in entry.inputs} for profile, sizes in dims.items()},
        tuple(node.name or "" for node in model.graph if node.op_type == "Attention"),
        {name: PAST + name.removeprefix(PRESENT) for name in outputs},
        {
            node.name: NodeFacts(node.op_type, tuple(value.name or "" for value in node.outputs))
            for node in model.graph.all_nodes()
            if node.name
        },
        used,
    )


def data_of(path: Path) -> Path:
    """Where weights lie that were packed in the bundle: beside the prepared graph ``path``."""
    return path.with_suffix(".data")


def _save(model: ir.Model, to: Path) -> None:
    unpacked = [v for v in model.graph.initializers.values() if isinstance(v.const_value, ir.LazyTensor)]
    if unpacked:
        # torch: only where weights were packed
        from dspark_export.bundle.weights import WeightFile

        with data_of(to).open("wb") as file:
            weights = WeightFile(data_of(to), file)
            for value in unpacked:
                assert value.const_value is not None
                value.const_value = weights.store(value.name or "", value.const_value)
    onnx.save_model(ir.to_proto(model), to)


def check_precision(entry: GraphEntry) -> None:
    """EnginePrecisionError for a float32 graph: fused attention exists for half precision only."""
    if entry.dtype == "float32" and entry.name != VERIFY:
        raise EnginePrecisionError(
            f"graph {entry.name} computes in float32, for which TensorRT has no fused attention; engines need half "
            f"precision: build the bundle with --precision {listed(HALF)}, or {listed(BLOCKED)} with --activations fp16"
        )


def has_cache(entry: GraphEntry) -> bool:
    """Whether the graph is a decoder: those are what engines are for."""
    return any(CAPACITY in spec.shape for spec in entry.inputs)


def _used(sizes: dict[str, Bounds], entry: GraphEntry) -> dict[str, Bounds]:
    wanted = {dim: spec.name for spec in entry.inputs for dim in spec.shape if isinstance(dim, str)}
    for dim, name in wanted.items():
        if dim not in sizes:
            raise EngineBuildError(
                f"input {name} of graph {entry.name} has a dimension {dim!r} that engines know no range for "
                f"(they know {', '.join(sizes)}); build the bundle again with this version"
            )
    return {dim: sizes[dim] for dim in wanted}


def _bounds(shape: tuple[int | str, ...], sizes: dict[str, Bounds]) -> list[list[int]]:
    return [[dim if isinstance(dim, int) else sizes[dim][which] for dim in shape] for which in range(3)]


def onnx_bytes(path: Path) -> int:
    """Size of a graph's file and of the weights it refers to, each counted once."""
    places = {
        (tensor.offset or 0, tensor.length or 0)
        for value in ir.load(path).graph.initializers.values()
        if isinstance(tensor := value.const_value, ir.ExternalTensor)
    }
    return path.stat().st_size + sum(length for _, length in places)
