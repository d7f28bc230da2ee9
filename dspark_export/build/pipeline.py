"""The build: checkpoint -> graphs -> bundle, in named stages.

Everything is written through :class:`BundleWriter`: a build that fails, is interrupted or killed leaves no bundle. The
output folder is claimed first, so that an unwritable folder is noticed before a model is downloaded.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import JsonValue

from dspark_export.build.options import AUTO, LAYERS, NONE, BuildOptions
from dspark_export.build.phrases import CORPUS_FILE, OWN, corpus_of, own_texts, with_corpus
from dspark_export.bundle.writer import BundleWriter
from dspark_export.checkpoints import resolve
from dspark_export.drafts.export import export_drafts, open_drafts, taps_of, write_vocab_maps
from dspark_export.drafts.opened import DraftGraphs
from dspark_export.engines.compile import add_engines, choose, require_compiler
from dspark_export.engines.options import CompileOptions, PluginsOption, Ranges
from dspark_export.engines.plugins import find_plugins
from dspark_export.graphs.layer_choice import parse_layers
from dspark_export.passes import all_forms, optimize
from dspark_export.passes.precision import PrecisionSettings, apply_precision
from dspark_runtime import Bundle
from dspark_runtime.bundle.contract import VERIFY
from dspark_runtime.bundle.engine_names import Flavour
from dspark_runtime.bundle.files import GRAPH_DIR, TOKENIZER_DIR, BundleFiles
from dspark_runtime.bundle.manifest import GraphEntry, Manifest, ModelFacts
from dspark_runtime.errors import BundleError
from dspark_runtime.phrases.store import write_corpus

if TYPE_CHECKING:
    import onnx_ir as ir
    from transformers import PreTrainedModel

    from dspark_export.build.calibrate import Calibration
    from dspark_export.checkpoints import Checkpoint
    from dspark_export.passes.kept_weights import KeptWeights

Stage = Literal[
    "check", "load", "self-draft", "trace", "optimize", "save", "tokenizer", "measure", "phrases", "compile", "commit"
]
DATA_FILE = "weights.data"


@dataclass(frozen=True)
class BuildResult:
    """A finished build: the bundle folder, its manifest, and how long each stage took."""

    out: Path
    manifest: Manifest
    seconds: dict[str, float]


class _Stages:
    """Announces stages and times them."""

    def __init__(self, announce: Callable[[Stage], None]) -> None:
        self._announce, self._began, self._current = announce, 0.0, ""
        self.seconds: dict[str, float] = {}

    def enter(self, stage: Stage) -> None:
        self.finish()
        self._announce(stage)
        self._began, self._current = time.perf_counter(), stage

    def finish(self) -> dict[str, float]:
        if self._current:
            self.seconds[self._current] = round(time.perf_counter() - self._began, 3)
        self._current = ""
        return self.seconds


def build(options: BuildOptions, on_stage: Callable[[Stage], None] = lambda stage: None) -> BuildResult:
    """Build the bundle ``options.out``; ``on_stage`` hears the name of every stage as it begins.

    Raises a CheckpointError for the model, ExportError for the graphs, BundleError for the output folder; nothing is
    left behind then.
    """
    stages = _Stages(on_stage)
    with BundleWriter(options.out, options.overwrite) as writer:
        stages.enter("check")
        if options.backend is not None:
            require_compiler(options.backend)
            find_plugins(CompileOptions(flavour=options.backend, plugins=options.plugins))
        # torch, transformers: only after the folder and the backend are checked
        from dspark_export.graphs.decoder import trace_without_weights

        trial = trace_without_weights if options.allow_untested else None
        checkpoint = resolve(options.model, options.revision, options.trust, trial)
        if options.kind.kept:
            checkpoint.require_integers()
        layers = _requested_layers(options, checkpoint)
        drafts = open_drafts(checkpoint, options.drafts, options.draft_settings)
        stages.enter("load")
        import torch

        model = checkpoint.load_model(getattr(torch, options.dtype))
        stages.enter("self-draft")
        agreement = None
        if options.self_draft != NONE:
            layers, agreement = _self_draft(model, checkpoint, layers)
        stages.enter("trace")
        graphs = _trace(model, layers, taps_of(drafts))
        stages.enter("optimize")
        kept = checkpoint.kept_weights(model, minima=options.with_kernels) if options.kind.kept else None
        _optimize(graphs, options, kept, _calibrated(model, checkpoint, options))
        settings = options.draft_settings
        exported = export_drafts(drafts, model, settings, lambda graph: _optimize({"": graph}, options, kept))
        stages.enter("save")
        facts = _facts(checkpoint, model)
        entries = _save(graphs, exported, writer.dir / GRAPH_DIR, options, layers, facts.max_positions, taps_of(drafts))
        write_vocab_maps(exported, writer.dir)
        manifest = _describe(checkpoint, facts, options, entries, layers, agreement, kept)
        manifest = manifest.model_copy(update={"drafters": (*manifest.drafters, *(draft.entry for draft in exported))})
        stages.enter("tokenizer")
        checkpoint.save_tokenizer(writer.dir / TOKENIZER_DIR)
        del graphs, exported, model
        gc.collect()  # models are full of cycles; measuring needs the memory for a second copy
        stages.enter("measure")
        manifest = _measure(writer, manifest, options)
        if options.phrases != 0 and checkpoint.tokenizer is not None:
            stages.enter("phrases")
            manifest = _phrases(writer, manifest, options)
        if options.backend is not None:
            stages.enter("compile")
            manifest = _compile(writer, manifest, options.backend, options.plugins)
        stages.enter("commit")
        manifest = writer.commit(manifest.model_copy(update={"validation": _floors(options, manifest)}))
    return BuildResult(writer.out, manifest, stages.finish())


def _floors(options: BuildOptions, manifest: Manifest) -> dict[str, JsonValue]:
    """Accepted lengths of the bundle that is replaced, for the next validation: drafts should not get worse unseen."""
    try:
        old = BundleFiles.open(options.out, verify=False).manifest
    except BundleError:
        return {}
    same = old.source.id == manifest.source.id and old.precision.weights == manifest.precision.weights
    return {key: old.validation[key] for key in ("level", "acceptance") if key in old.validation} if same else {}


def _requested_layers(options: BuildOptions, checkpoint: Checkpoint) -> tuple[int, ...] | None:
    if options.self_draft in (AUTO, NONE):
        return None
    count = checkpoint.config.get_text_config().num_hidden_layers
    return parse_layers(options.self_draft.removeprefix(LAYERS), count)


def _self_draft(
    model: PreTrainedModel, checkpoint: Checkpoint, layers: tuple[int, ...] | None
) -> tuple[tuple[int, ...] | None, float | None]:
    """The layers to draft with and their agreement with the target; ``layers`` None: choose by measuring.

    Without a tokenizer there are no texts to measure on: only explicitly requested layers are used then, and their
    agreement is unknown.
    """
    # torch, transformers: only when a model is loaded
    from dspark_export.graphs.self_draft_choice import agreement, choose

    if checkpoint.tokenizer is None:  # nothing to measure on
        return layers, None
    if layers is None:
        choice = choose(model, checkpoint.tokenizer.backend)
        return choice.layers, choice.agreement
    return layers, agreement(model, checkpoint.tokenizer.backend, layers)


def _trace(model: PreTrainedModel, layers: Sequence[int] | None, taps: Sequence[int]) -> dict[str, ir.Model]:
    # torch, transformers: only when a model is traced
    from dspark_export.graphs.decoder import DecoderTrace
    from dspark_export.graphs.self_draft import export_self_draft
    from dspark_export.graphs.target import export_target

    trace = DecoderTrace(model)
    graphs = {"target": export_target(trace, taps=taps)}
    if layers is not None:
        graphs["self_draft"] = export_self_draft(trace, layers)
    return graphs


def _calibrated(
    model: PreTrainedModel, checkpoint: Checkpoint, options: BuildOptions
) -> Callable[[ir.Model], Calibration] | None:
    """What finds out how large activations get, from the optimized target graph; None if that is not requested."""
    tokenizer = checkpoint.tokenizer
    if not options.kind.integer_products or tokenizer is None:
        return None
    # torch, transformers: only when activations are quantized
    from dspark_export.build.calibrate import calibrate

    return lambda graph: calibrate(model, tokenizer.backend, graph)


def _optimize(
    graphs: dict[str, ir.Model],
    options: BuildOptions,
    kept: KeptWeights | None,
    calibrated: Callable[[ir.Model], Calibration] | None = None,
) -> None:
    settings = PrecisionSettings(
        options.precision, options.block, head=options.quantize_head, embedding=options.embedding_too
    )
    for graph in graphs.values():
        optimize(graph, kept)
    if calibrated is not None:
        calibrated(graphs["target"]).apply(graphs)
    for graph in graphs.values():
        apply_precision(graph, settings, kept)
    if kept is not None:
        kept.require_some()


def _save(
    graphs: dict[str, ir.Model],
    drafts: Sequence[DraftGraphs],
    folder: Path,
    options: BuildOptions,
    layers: Sequence[int] | None,
    positions: int,
    taps: Sequence[int],
) -> list[GraphEntry]:
    """Write every graph, standard and for ONNX Runtime's CPU provider, and the verify graph; return their entries."""
    # torch, transformers: only when traced graphs are written
    from dspark_export.build.manifest import file_stem, graph_entry
    from dspark_export.bundle.weights import save_graphs
    from dspark_export.graphs.verify import build_verify_model
    from dspark_export.passes.inner_values import hide_inner_values

    caches = {name: draft.cache for draft in drafts for name in draft.graphs}
    made = {**graphs, **{name: g for draft in drafts for name, g in draft.graphs.items()}}
    forms = all_forms(made, positions, kernels=options.with_kernels)
    for name, _, graph in forms:
        if name in caches:
            hide_inner_values(graph)
    forms.append((VERIFY, "standard", build_verify_model()))
    save_graphs({file_stem(name, variant): model for name, variant, model in forms}, folder, DATA_FILE)
    return [
        graph_entry(
            name,
            variant,
            model,
            folder,
            options.dtype if variant == "standard" and name != VERIFY else "float32",
            layers if name == "self_draft" else None,
            taps=taps if name == "target" else (),
            cache=caches.get(name),
        )
        for name, variant, model in forms
    ]


def _facts(checkpoint: Checkpoint, model: PreTrainedModel) -> ModelFacts:
    # torch, transformers: only when a model is loaded
    from dspark_export.build.manifest import model_facts
    from dspark_export.tracing.geometry import probe

    return model_facts(checkpoint, model, probe(model.config))


def _describe(
    checkpoint: Checkpoint,
    facts: ModelFacts,
    options: BuildOptions,
    entries: Sequence[GraphEntry],
    layers: Sequence[int] | None,
    agreement: float | None,
    kept: KeptWeights | None,
) -> Manifest:
    # transformers: only when traced graphs are described
    from dspark_export.build.manifest import drafters, manifest

    return manifest(checkpoint, options, facts, entries, drafters(layers, agreement), kept=kept)


def _measure(writer: BundleWriter, manifest: Manifest, options: BuildOptions) -> Manifest:
    """The manifest with step costs and row noise, measured on the files as they will be shipped."""
    # onnxruntime, transformers: only when a bundle is measured
    from dspark_export.build.manifest import measured_precision
    from dspark_export.build.measure import measure

    writer.preview(manifest)
    found = measure(BundleFiles.open(writer.dir, verify=False), options.threads)
    precision = measured_precision(manifest.precision, found.row_noise, options)
    return manifest.model_copy(update={"costs": found.costs, "precision": precision})


def _phrases(writer: BundleWriter, manifest: Manifest, options: BuildOptions) -> Manifest:
    """The manifest with a corpus of phrases, which the target has written with the files as they will be shipped."""
    writer.preview(manifest)
    bundle = Bundle.open(writer.dir, threads=options.threads, verify_digests=False)
    texts = own_texts(bundle, options.phrases)
    if not texts:
        return manifest
    made = corpus_of(texts, manifest.model.vocab_size, OWN)
    write_corpus(writer.dir / CORPUS_FILE, made.packed)
    return with_corpus(manifest, made.facts)


def _compile(writer: BundleWriter, manifest: Manifest, flavour: Flavour, plugins: PluginsOption) -> Manifest:
    """The manifest with engines of every graph that can have one, which are written beside the graphs."""
    options = CompileOptions(flavour=flavour, ranges=Ranges.fitting(manifest.model.max_positions), plugins=plugins)
    manifest = writer.preview(manifest)
    made, _ = add_engines(writer.dir, manifest, choose(manifest, options), options, lambda *progress: None)
    return made
