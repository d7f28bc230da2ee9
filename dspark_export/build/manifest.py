"""Fills the manifest from what a build made."""

from __future__ import annotations

import platform
import warnings
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import onnx_ir as ir
from transformers import PreTrainedModel

from dspark_export.build.options import BuildOptions
from dspark_export.checkpoints import Checkpoint
from dspark_export.checkpoints.config import POSITIONS, positions_of
from dspark_export.checkpoints.inventory import generic
from dspark_export.passes import kernels_of, without_kernel
from dspark_export.passes.kept_weights import KeptWeights
from dspark_runtime.backends.protocol import ROUNDED_ACTIVATIONS
from dspark_runtime.bundle.contract import CacheLayer, TensorSpec
from dspark_runtime.bundle.files import GRAPH_DIR
from dspark_runtime.bundle.manifest import DrafterEntry, GraphEntry, Manifest, ModelFacts, Precision, RowNoise, Variant
from dspark_runtime.errors import ExportError

_TOOLS = ("torch", "transformers", "tokenizers", "onnx", "onnx-ir", "onnxscript", "onnxruntime")


class ExactnessWarning(UserWarning):
    """Exact output was requested where it is expensive."""


def file_stem(name: str, variant: str) -> str:
    """File name of a graph without its suffix."""
    return name if variant == "standard" else f"{name}.{variant}"


def tool_versions() -> dict[str, str]:
    """Versions of the installed libraries a bundle depends on."""
    versions = {"python": platform.python_version()}
    for tool in _TOOLS:
        try:
            versions[tool] = metadata.version(tool)
        except metadata.PackageNotFoundError:
            continue
    return versions


def own_version() -> str:
    """Name and version of this distribution."""
    try:
        return f"dspark-export {metadata.version('dspark-export')}"
    except metadata.PackageNotFoundError:
        return "dspark-export (not installed)"


def model_facts(checkpoint: Checkpoint, model: PreTrainedModel, cache: Sequence[CacheLayer]) -> ModelFacts:
    """The facts the runtime needs; raises ExportError if the config leaves the number of positions open."""
    config = model.config.get_text_config()
    positions = positions_of(model.config)
    if positions is None:
        raise ExportError(
            f"the config of {checkpoint.id} has none of {', '.join(POSITIONS)}; add max_position_embeddings"
        )
    return ModelFacts(
        architecture=type(model).__name__,
        model_type=config.model_type,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_layers=len(cache),
        max_positions=positions,
        cache=tuple(cache),
        eos_token_ids=tuple(checkpoint.eos_token_ids),
        bos_token_id=checkpoint.bos_token_id,
        pad_token_id=checkpoint.pad_token_id,
    )


def graph_entry(
    name: str,
    variant: Variant,
    model: ir.Model,
    folder: Path,
    dtype: str,
    layers: Sequence[int] | None,
    *,
    taps: Sequence[int] = (),
    cache: Sequence[CacheLayer] | None = None,
) -> GraphEntry:
    """The entry of a graph saved in ``folder``; data files are read back from the file."""
    file = f"{file_stem(name, variant)}.onnx"
    saved = ir.load(folder / file)
    data = {
        str(value.const_value.location)
        for graph in saved.graphs()
        for value in graph.initializers.values()
        if isinstance(value.const_value, ir.ExternalTensor)
    }
    return GraphEntry.model_validate(
        {
            "name": name,
            "variant": variant,
            "file": f"{GRAPH_DIR}/{file}",
            "data_files": sorted(f"{GRAPH_DIR}/{location}" for location in data),
            "dtype": dtype,
            "layers": None if layers is None else tuple(layers),
            "taps": tuple(taps),
            "cache": None if cache is None else tuple(cache),
            "kernels": kernels_of(model),
            "standard_nodes": without_kernel(model) if variant == "sequence-kernels" else {},
            "inputs": [_spec(value) for value in model.graph.inputs],
            "outputs": [_spec(value) for value in model.graph.outputs],
        }
    )


def _spec(value: ir.Value) -> TensorSpec:
    if value.dtype is None or value.shape is None:
        raise ExportError(f"the graph's tensor {value.name} has no type or shape")
    dims = tuple(dim if isinstance(dim, int) else str(dim.value) for dim in value.shape)
    return TensorSpec(str(value.name), str(value.dtype.numpy()), dims)


def drafters(layers: Sequence[int] | None, agreement: float | None) -> tuple[DrafterEntry, ...]:
    """The drafters a bundle offers: n-gram and the store always, self-draft if there is a graph for it."""
    free = DrafterEntry(name="ngram", kind="ngram"), DrafterEntry(name="store", kind="store")
    if layers is None:
        return free
    settings = {"layers": list(layers)}
    return (
        *free,
        DrafterEntry.model_validate(
            {
                "name": "self-draft",
                "kind": "self_draft",
                "graph": "self_draft",
                "settings": settings,
                "agreement": agreement,
            }
        ),
    )


def precision(options: BuildOptions, kept: KeptWeights | None = None) -> Precision:
    """How weights are stored; row noise is added once it was measured."""
    if not options.quantized:
        return Precision(weights=options.precision, exact=options.exact_text)
    return Precision(
        weights=options.precision,
        block_size=options.block,
        head=options.quantize_head,
        embedding=options.embedding_too,
        exact=options.exact_text,
        accuracy_level=ROUNDED_ACTIVATIONS,
        in_floats={} if kept is None else {generic(name): reason for name, reason in kept.not_kept().items()},
    )


def measured_precision(stored: Precision, noise: RowNoise | None, options: BuildOptions) -> Precision:
    """``stored`` with what was measured of it.

    Some are exact only if that is requested, or if it costs nothing: with noise among several rows,
    exact text needs float32 products, which take several times as long. ExactnessWarning if it was requested.
    """
    stored = stored.model_copy(update={"row_noise": noise})
    if stored.kind.exact_by_default or not stored.exact or stored.rows_agree:
        return stored
    if options.exact is None:
        return stored.model_copy(update={"exact": False})
    found = "was not measured" if noise is None else f"is {noise.without_single_rows:.3g}"
    warnings.warn(
        f"exact text of this {stored.weights} bundle takes float32 products here, which are slower: the difference of "
        f"logits between passes over two rows and more {found}; leave out --exact, or try another --block-size",
        ExactnessWarning,
        stacklevel=2,
    )
    return stored


def manifest(
    checkpoint: Checkpoint,
    options: BuildOptions,
    facts: ModelFacts,
    graphs: Sequence[GraphEntry],
    drafter_entries: Sequence[DrafterEntry],
    validation: Mapping[str, float | int | str] | None = None,
    kept: KeptWeights | None = None,
) -> Manifest:
    """The whole manifest except measurements and file digests."""
    return Manifest(
        created_by=own_version(),
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        tools=tool_versions(),
        source=checkpoint.source(),
        model=facts,
        graphs=tuple(graphs),
        drafters=tuple(drafter_entries),
        precision=precision(options, kept),
        validation=dict(validation or {}),
    )
