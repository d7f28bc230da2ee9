"""Adds engines to a bundle: compiles, inspects, then puts plans, logs and the new manifest in place atomically."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from dspark_export.bundle.writer import BundleWriter
from dspark_export.engines.compiler import compile_graph
from dspark_export.engines.failures import compiler_missing
from dspark_export.engines.inspection import inspect
from dspark_export.engines.options import CompileOptions
from dspark_export.engines.plugin_forms import INLINED, Plugins
from dspark_export.engines.plugins import SORT_LIMIT, find_plugins, require_limits
from dspark_export.engines.prepare import check_precision, data_of, has_cache, onnx_bytes, prepare
from dspark_runtime.backends.tensorrt_device import MODULES
from dspark_runtime.bundle.contract import VERIFY
from dspark_runtime.bundle.engine_entry import EngineBuild, EngineEntry, EngineProfile
from dspark_runtime.bundle.engine_names import Flavour
from dspark_runtime.bundle.files import ENGINE_DIR, BundleFiles
from dspark_runtime.bundle.manifest import GraphEntry, Manifest
from dspark_runtime.errors import UsageError

Progress = Callable[[str, str, int, int], None]


@dataclass(frozen=True)
class CompileResult:
    """A bundle with engines, and those this compilation made."""

    out: Path
    manifest: Manifest
    engines: tuple[EngineEntry, ...] = field(default=())


def compile_bundle(
    bundle: Path, options: CompileOptions, on_progress: Progress = lambda graph, phase, step, steps: None
) -> CompileResult:
    """Compile graphs of ``bundle`` and replace it by a copy with the engines; ``on_progress`` hears graph and phase.

    The bundle stays as it was if anything fails. Its files are copied, so the disk has to hold it twice for a while.
    Engines of the same graph, flavour and targets are replaced.

    Raises:
        BundleError: the bundle is damaged, or cannot be written.
        EngineBuildError: a graph cannot be compiled.
        CompilerMissing: the flavour is not installed.
        UsageError: a graph that is not there.
    """
    require_compiler(options.flavour)
    files = BundleFiles.open(bundle)
    chosen = choose(files.manifest, options)
    with BundleWriter(files.root, overwrite=True) as writer:
        writer.copy(files)
        manifest, made = add_engines(writer.dir, files.manifest, chosen, options, on_progress)
        manifest = writer.commit(manifest)
    return CompileResult(writer.out, manifest, made)


def require_compiler(flavour: Flavour) -> None:
    """Raise CompilerMissing unless the compiler of ``flavour`` and Polygraphy are installed."""
    for module in (MODULES[flavour], "polygraphy"):
        if find_spec(module) is None:
            raise compiler_missing(flavour, f"there is no module {module}")


def choose(manifest: Manifest, options: CompileOptions) -> list[GraphEntry]:
    """The standard graphs to compile: those requested, else all with a cache, and ``verify`` where it can be.

    ``verify`` sorts whole vocabularies where a sequence filters, and TensorRT sorts at most 3840 numbers: without
    plugins it is compiled for small vocabularies only.

    Raises:
        UsageError: there is no such graph, or ``--max-length`` is longer than the model's positions.
        EnginePrecisionError: a decoder computes in float32.
    """
    standard = {graph.name: graph for graph in manifest.graphs if graph.variant == "standard"}
    decoders = [name for name, graph in standard.items() if has_cache(graph)]
    known = [*decoders, *(name for name in standard if name == VERIFY)]
    names = decoders if options.graphs is None else list(dict.fromkeys(options.graphs))
    if options.graphs is None and VERIFY in known and compiles_verify(find_plugins(options), options, manifest):
        names = known
    if unknown := [name for name in names if name not in known]:
        raise UsageError(f"--graph {unknown[0]} is not a graph to compile engines from; choose {', '.join(known)}")
    if options.ranges.max_length > manifest.model.max_positions:
        raise UsageError(
            f"--max-length {options.ranges.max_length} is more than the {manifest.model.max_positions} positions of "
            "the model; lower it"
        )
    for name in names:
        check_precision(standard[name])
    return [standard[name] for name in names]


def compiles_verify(plugins: Plugins | None, options: CompileOptions, manifest: Manifest) -> bool:
    """Whether ``verify`` gets an engine unasked: by plugins, or inlined where that was chosen and fits."""
    if plugins is None:
        return False
    return plugins.form != "none" or vocab_of(manifest) <= SORT_LIMIT


def vocab_of(manifest: Manifest) -> int:
    """Width of the target's logits."""
    target = next(graph for graph in manifest.graphs if graph.name == "target" and graph.variant == "standard")
    width = next(spec for spec in target.outputs if spec.name == "logits").shape[-1]
    assert isinstance(width, int), "a target's logits have a fixed width"
    return width


def add_engines(
    folder: Path, manifest: Manifest, graphs: Sequence[GraphEntry], options: CompileOptions, on_progress: Progress
) -> tuple[Manifest, tuple[EngineEntry, ...]]:
    """Compile ``graphs`` of the bundle written in ``folder``; returns the manifest with its engines, and the new ones.

    The manifest's digests are those of the graphs in ``folder``.
    """
    digests = {graph.name: manifest.files[graph.file].sha256 for graph in graphs}
    plugins, vocab = INLINED, None
    if any(graph.name == VERIFY for graph in graphs):
        plugins, vocab = find_plugins(options) or INLINED, vocab_of(manifest)
        if plugins.form != "none":
            require_limits(options, vocab)
    made = tuple(
        compile_entry(folder, graph, digests[graph.name], options, on_progress, plugins, vocab) for graph in graphs
    )
    replaced = {(engine.graph, engine.flavour, engine.targets) for engine in made}
    kept = [e for e in manifest.engines if (e.graph, e.flavour, e.targets) not in replaced]
    for old in manifest.engines:
        if old not in kept and old.file not in {engine.file for engine in made}:
            for path in (old.file, old.log):
                (folder / path).unlink(missing_ok=True)
    return manifest.model_copy(update={"engines": (*kept, *made)}), made


def compile_entry(
    folder: Path,
    graph: GraphEntry,
    digest: str,
    options: CompileOptions,
    on_progress: Progress,
    plugins: Plugins = INLINED,
    vocab: int | None = None,
) -> EngineEntry:
    """Compile one graph of ``folder``, of SHA-256 ``digest``; plan and log are put below ``engines/``.

    ``plugins`` and ``vocab``, the width of logits, are for the graph ``verify``.

    Raises:
        EngineBuildError: the graph cannot be compiled, or the engine is not what was requested.
        CompilerMissing: the flavour is not installed.
    """
    partial = folder / ENGINE_DIR / ".partial"
    partial.mkdir(parents=True, exist_ok=True)
    prepared_file = folder / Path(graph.file).parent / f".{graph.name}.engine.onnx"
    try:
        prepared = prepare(graph, folder, options.ranges, prepared_file, plugins=plugins, vocab=vocab)
        plan, log = partial / "plan", partial / "log"
        done = compile_graph(
            prepared,
            options,
            plan,
            log,
            lambda phase, step, steps: on_progress(graph.name, phase, step, steps),
            plugins,
        )
        inspection = inspect(prepared, done)
        place = f"{ENGINE_DIR}/{options.flavour}-{done['version']}-{options.targets}"
        (folder / place).mkdir(parents=True, exist_ok=True)
        file, text = f"{place}/{graph.name}.plan", f"{place}/{graph.name}.log"
        plan.replace(folder / file)
        log.replace(folder / text)
        return EngineEntry(
            graph=graph.name,
            flavour=options.flavour,
            version=done["version"],
            cuda=done["cuda"],
            targets=tuple(done["targets"]),
            file=file,
            log=text,
            graph_sha256=digest,
            dtype=graph.dtype,
            capacity=options.ranges.max_length,
            profiles=tuple(EngineProfile(name=name, dims=dims) for name, dims in prepared.dims.items()),
            version_compatible=options.version_compatible,
            hardware_compatible=options.hardware_compatible,
            refittable=options.refittable or options.strip_weights,
            stripped=options.strip_weights,
            plugins=prepared.plugins,
            plugin_form=plugins.form if prepared.plugins else "none",
            inspection=inspection,
            build=EngineBuild(
                seconds=round(done["seconds"], 3),
                peak_memory=done["peak_memory"],
                plan=done["plan_bytes"],
                onnx=onnx_bytes(folder / graph.file),
                scratch=done["scratch"],
            ),
        )
    finally:
        prepared_file.unlink(missing_ok=True)
        data_of(prepared_file).unlink(missing_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
