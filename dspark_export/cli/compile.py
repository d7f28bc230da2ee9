"""``dspark-export compile``: a bundle gets TensorRT engines."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dspark_export.cli.arguments import AsJson
from dspark_export.cli.progress import bars
from dspark_export.engines.options import CompileOptions, PluginsOption, Ranges
from dspark_runtime.bundle.engine_names import Flavour, HardwareCompatibility

if TYPE_CHECKING:
    from dspark_runtime.bundle.engine_entry import EngineEntry


def compile_(
    bundle: Annotated[Path, typer.Argument(help="Folder of a bundle in fp16 or bf16.", show_default=False)],
    backend: Annotated[Flavour, typer.Option(help="Choose the compiler.")] = "tensorrt-rtx",
    graph: Annotated[
        list[str] | None, typer.Option(help="Compile this graph (default: all that can be compiled). Repeatable.")
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Allow this many sequences per pass (default: 1).")] = None,
    max_length: Annotated[
        int | None,
        typer.Option(help="Allow this many cache slots per sequence (default: the model's positions, at most 4096)."),
    ] = None,
    verify_rows: Annotated[
        int | None, typer.Option(help="Allow this many rows per decode or verify pass (default: 32).")
    ] = None,
    chunk: Annotated[int | None, typer.Option(help="Allow this many tokens per prefill pass (default: 512).")] = None,
    compute_capability: Annotated[
        list[str] | None,
        typer.Option(help="tensorrt-rtx: compile for this one, such as 8.6 (default: all from 8.0). Repeatable."),
    ] = None,
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="tensorrt: let later versions run the engine.")
    ] = False,
    hardware_compatible: Annotated[
        HardwareCompatibility, typer.Option(help="tensorrt: let other GPUs run the engine.")
    ] = "none",
    refittable: Annotated[
        bool, typer.Option("--refittable", help="Make weights replaceable in the compiled plan.")
    ] = False,
    strip_weights: Annotated[bool, typer.Option("--strip-weights", help="Leave the weights out of the plan.")] = False,
    plugins: Annotated[
        PluginsOption,
        typer.Option(help="Verify with the plugin library, with kernels in the plan (aot), or with neither."),
    ] = "auto",
    timing_cache: Annotated[Path | None, typer.Option(help="tensorrt: read and extend this timing cache.")] = None,
    as_json: AsJson = False,
) -> None:
    """Compile the graphs of BUNDLE to TensorRT engines and add them to it. tensorrt-rtx needs no GPU for that."""
    # onnx, pydantic: only when a bundle is compiled
    from dspark_export.engines.compile import compile_bundle
    from dspark_runtime.bundle.files import BundleFiles

    positions = BundleFiles.open(bundle, verify=False).manifest.model.max_positions
    options = CompileOptions(
        flavour=backend,
        ranges=Ranges.fitting(positions, batch, max_length, verify_rows, chunk),
        graphs=tuple(graph) if graph else None,
        compute_capabilities=tuple(compute_capability or ()),
        version_compatible=version_compatible,
        hardware_compatible=hardware_compatible,
        refittable=refittable,
        strip_weights=strip_weights,
        timing_cache=timing_cache,
        plugins=plugins,
    )
    with shown_progress() as on_progress:
        result = compile_bundle(bundle, options, on_progress)
    if as_json:
        engines = [engine.model_dump() for engine in result.engines]
        typer.echo(json.dumps({"bundle": str(result.out), "engines": engines}))
    else:
        for engine in result.engines:
            typer.echo(describe(engine))


def describe(engine: EngineEntry) -> str:
    """One line: what was compiled, how long it took, how large it is."""
    build, found = engine.build, engine.inspection
    targets = ", ".join(engine.targets) or "default GPUs"
    return (
        f"{engine.graph:<12} {engine.flavour} {engine.version} for {targets}: {build.seconds:.1f} s, "
        f"{build.peak_memory / 1e6:.0f} MB memory, plan {build.plan / 1e6:.1f} MB (ONNX {build.onnx / 1e6:.1f} MB), "
        f"{found.attention} fused attentions, {found.aliased} caches in place"
    )


@contextmanager
def shown_progress() -> Iterator[Callable[[str, str, int, int], None]]:
    """A bar on stderr for the outermost phase of the graph being compiled; nothing if stderr is not a terminal."""
    from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn

    with bars(TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()) as shown:
        tasks: dict[str, TaskID] = {}

        def on_progress(graph: str, phase: str, step: int, steps: int) -> None:
            if graph not in tasks:
                tasks[graph] = shown.add_task(graph, total=None)
            shown.update(tasks[graph], description=f"{graph}: {phase}", total=steps or None, completed=step)

        yield on_progress
