"""``dspark-export compile``: a bundle gets TensorRT engines."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from dspark_runtime.bundle.engine_entry import EngineEntry


class BackendName(StrEnum):
    """Values of ``--backend``."""

    TENSORRT_RTX = "tensorrt-rtx"
    TENSORRT = "tensorrt"


class PluginsName(StrEnum):
    """Values of ``--plugins``."""

    AUTO = "auto"
    LIBRARY = "library"
    AOT = "aot"
    NONE = "none"


class CompatibilityName(StrEnum):
    """Values of ``--hardware-compatible``."""

    NONE = "none"
    AMPERE_PLUS = "ampere-plus"
    SAME = "same-compute-capability"


def compile_(
    bundle: Annotated[Path, typer.Argument(help="Folder of a bundle in fp16 or bf16.", show_default=False)],
    backend: Annotated[BackendName, typer.Option(help="Which compiler.")] = BackendName.TENSORRT_RTX,
    graph: Annotated[
        list[str] | None, typer.Option(help="A graph to compile (default: all that can be). Repeatable.")
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Most sequences of a pass (default: 1).")] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Cache slots of a sequence (default: the model's positions, at most 4096).")
    ] = None,
    verify_rows: Annotated[int | None, typer.Option(help="Most rows of a decode or verify pass (default: 32).")] = None,
    chunk: Annotated[int | None, typer.Option(help="Most tokens of a prefill pass (default: 512).")] = None,
    compute_capability: Annotated[
        list[str] | None,
        typer.Option(help="tensorrt-rtx: compile for this one, such as 8.6 (default: all from 8.0). Repeatable."),
    ] = None,
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="tensorrt: later versions may run the engine.")
    ] = False,
    hardware_compatible: Annotated[
        CompatibilityName, typer.Option(help="tensorrt: other GPUs may run the engine.")
    ] = CompatibilityName.NONE,
    refittable: Annotated[bool, typer.Option("--refittable", help="Weights can be replaced later.")] = False,
    strip_weights: Annotated[bool, typer.Option("--strip-weights", help="Leave the weights out of the plan.")] = False,
    plugins: Annotated[
        PluginsName, typer.Option(help="How verification runs: in the plugin library, in the plan (aot), or neither.")
    ] = PluginsName.AUTO,
    timing_cache: Annotated[Path | None, typer.Option(help="tensorrt: file to read and extend.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Compile the graphs of BUNDLE to TensorRT engines and add them to it. tensorrt-rtx needs no GPU for that."""
    from dspark_export.engines.compile import compile_bundle
    from dspark_export.engines.options import CompileOptions, Ranges
    from dspark_runtime.bundle.files import BundleFiles

    positions = BundleFiles.open(bundle, verify=False).manifest.model.max_positions
    options = CompileOptions(
        flavour=backend.value,
        ranges=Ranges.fitting(positions, batch, max_length, verify_rows, chunk),
        graphs=tuple(graph) if graph else None,
        compute_capabilities=tuple(compute_capability or ()),
        version_compatible=version_compatible,
        hardware_compatible=hardware_compatible.value,
        refittable=refittable,
        strip_weights=strip_weights,
        timing_cache=timing_cache,
        plugins=plugins.value,
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
    """A bar on stderr for the outermost phase of the graph being compiled; nothing where that is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        tasks: dict[str, TaskID] = {}

        def on_progress(graph: str, phase: str, step: int, steps: int) -> None:
            if graph not in tasks:
                tasks[graph] = bars.add_task(graph, total=None)
            bars.update(tasks[graph], description=f"{graph}: {phase}", total=steps or None, completed=step)

        yield on_progress
