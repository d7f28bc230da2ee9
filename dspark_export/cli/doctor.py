"""``dspark-export doctor``: what is installed, which backends work, and how to get what is missing.

Needs only this package, typer, packaging and the standard library; it looks for everything else without relying on
it.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import cache
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from dspark_runtime.backends.ort_kernels import HOW_TO_GET, LOSS, kernel_library
from dspark_runtime.backends.plugin_files import LIBRARY, plugin_file
from dspark_runtime.errors import BackendError
from dspark_runtime.processors import this_machine

_DISTRIBUTIONS = ("dspark-export", "dspark-runtime")
_CPU, _KERNELS, _CUDA = "ONNX Runtime, CPU", "sequence kernels, CPU", "ONNX Runtime, CUDA"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. ``needed_for`` is ``all`` or the extras; ``remedy`` is empty when all is well."""

    name: str
    works: bool
    detail: str
    remedy: str = ""
    needed_for: str = "all"


@dataclass(frozen=True)
class EngineFinding:
    """One engine of a bundle: the graph it is of, what it needs, and every reason why it cannot run here."""

    graph: str
    needs: str
    works: bool
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Dependency:
    """A declared dependency; ``extras`` is empty if it is always needed."""

    name: str
    versions: SpecifierSet
    extras: tuple[str, ...]

    @property
    def command(self) -> str:
        """What installs it."""
        return f'pip install "{self.name}{self.versions}"'


def doctor(
    bundle: Annotated[
        Path | None,
        typer.Argument(help="Also say whether the engines of this bundle can run here.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Say what is installed, which backends work, and how to get the rest. Exit code 8 if the CPU backend does not."""
    engines = None if bundle is None else _engines(bundle)
    machine = _machine()
    backends = [_guarded(name, check) for name, check in _BACKENDS.items()]
    packages = _packages()
    healthy = any(finding.works for finding in backends if finding.name == _CPU)
    if as_json:
        found = {"healthy": healthy, "machine": machine}
        found |= {"backends": [asdict(f) for f in backends], "packages": [asdict(f) for f in packages]}
        if engines is not None:
            found["engines"] = [asdict(f) for f in engines]
        typer.echo(json.dumps(found))
    else:
        _print(machine, backends, packages)
        if engines is not None:
            _print_engines(engines)
    if not healthy:
        raise typer.Exit(BackendError.exit_code)


def _engines(bundle: Path) -> list[EngineFinding]:
    """Every engine of ``bundle``, whose files are checked first: a damaged plan is an error, not a finding."""
    # pydantic: only when a bundle is examined
    from dspark_runtime.backends.tensorrt_check import checked_plan, refusals
    from dspark_runtime.backends.tensorrt_device import installed_version, this_device
    from dspark_runtime.bundle.files import BundleFiles

    files, device, library = BundleFiles.open(bundle), this_device(), plugin_file(LIBRARY)
    found = []
    for engine in files.manifest.engines:
        reasons = refusals(engine, files.manifest, installed_version(engine.flavour), device, library)
        if not reasons:
            checked_plan(files, engine)
        found.append(EngineFinding(engine.graph, f"{engine.flavour} {engine.version}", not reasons, tuple(reasons)))
    return found


def _machine() -> dict[str, str]:
    found = this_machine()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": found.cpu,
        "cores": f"{found.physical_cores} ({found.logical_cores} threads)",
        "instructions": " ".join(found.instructions) or "none of note",
    }


@cache
def _dependencies() -> dict[str, Dependency]:
    """What the installed distributions declare, by name, except each other; empty if they are not installed."""
    found: dict[str, Dependency] = {}
    for distribution in _DISTRIBUTIONS:
        try:
            declared = metadata.metadata(distribution)
        except metadata.PackageNotFoundError:
            continue
        for wanted in map(Requirement, declared.get_all("Requires-Dist") or ()):
            extras = _extras(wanted, declared.get_all("Provides-Extra") or ())
            if extras is None or wanted.name in _DISTRIBUTIONS:
                continue
            known = found.get(wanted.name, Dependency(wanted.name, SpecifierSet(), extras))
            always = not (known.extras and extras)
            merged = () if always else tuple(dict.fromkeys((*known.extras, *extras)))
            found[wanted.name] = Dependency(wanted.name, known.versions & wanted.specifier, merged)
    return found


def _extras(wanted: Requirement, provided: Iterable[str]) -> tuple[str, ...] | None:
    """Extras that bring in ``wanted``: empty if it is always needed, None if never on this machine."""
    if wanted.marker is None or wanted.marker.evaluate({"extra": ""}):
        return ()
    return tuple(extra for extra in provided if wanted.marker.evaluate({"extra": extra})) or None


def _command(name: str) -> str:
    known = _dependencies().get(name)
    return known.command if known is not None else f"pip install {name}"


def _packages() -> list[Finding]:
    """Every declared dependency with the version that is installed and the one that is wanted."""
    if not _dependencies():
        remedy = "pip install -e . -e ./runtime, in the folder of the project"
        return [Finding(_DISTRIBUTIONS[0], False, "runs from a folder, not installed", remedy)]
    return [_package(dependency) for dependency in _dependencies().values()]


def _package(dependency: Dependency) -> Finding:
    needed_for = ", ".join(dependency.extras) or "all"
    wanted = str(dependency.versions) or "any version"
    try:
        version = metadata.version(dependency.name)
    except metadata.PackageNotFoundError:
        return Finding(dependency.name, False, f"not installed, wanted {wanted}", dependency.command, needed_for)
    if not dependency.versions.contains(version, prereleases=True):
        detail = f"{version}, but wanted {wanted}"
        return Finding(dependency.name, False, detail, dependency.command, needed_for)
    return Finding(dependency.name, True, f"{version}, wanted {wanted}", "", needed_for)


def _guarded(name: str, check: Callable[[], Finding]) -> Finding:
    """A broken installation may fail in any way while it is imported: that is a finding, too."""
    try:
        return check()
    except Exception as error:
        return Finding(name, False, f"{type(error).__name__}: {error}", "install it again; see the message")


def _onnxruntime_cpu() -> Finding:
    if find_spec("onnxruntime") is None:
        return Finding(_CPU, False, "onnxruntime is not installed", _command("onnxruntime"))
    if find_spec("onnx") is None:
        return Finding(_CPU, False, "not tried: onnx, which makes the graph to run, is missing", _command("onnx"))
    version = metadata.version("onnxruntime") if _has("onnxruntime") else import_module("onnxruntime").__version__
    try:
        written = _run_scatter("CPUExecutionProvider")
    except Exception as error:
        remedy = _command("onnxruntime").replace("install", "install --upgrade", 1)
        return Finding(_CPU, False, f"onnxruntime {version} cannot run an opset-24 graph: {error}", remedy)
    if not written:
        return Finding(_CPU, False, f"onnxruntime {version} runs an opset-24 graph wrongly", _command("onnxruntime"))
    return Finding(_CPU, True, f"onnxruntime {version} ran an opset-24 graph that updates a cache")


def _has(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def _run_scatter(provider: str) -> bool:
    """Whether TensorScatter, opset 24, puts a row into a cache as it should."""
    import numpy as np
    import onnxruntime as ort
    from onnx import TensorProto, helper

    cache_shape: list[str | int | None] = ["batch", 1, "capacity", 2]
    graph = helper.make_graph(
        [helper.make_node("TensorScatter", ["past", "new", "at"], ["present"], axis=2)],
        "doctor",
        [
            helper.make_tensor_value_info("past", TensorProto.FLOAT, cache_shape),
            helper.make_tensor_value_info("new", TensorProto.FLOAT, ["batch", 1, "tokens", 2]),
            helper.make_tensor_value_info("at", TensorProto.INT64, ["batch"]),
        ],
        [helper.make_tensor_value_info("present", TensorProto.FLOAT, cache_shape)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(model.SerializeToString(), options, providers=[provider])
    if provider not in session.get_providers():
        raise RuntimeError(f"the provider did not load; the session fell back to {', '.join(session.get_providers())}")
    feeds = {"past": np.zeros((1, 1, 4, 2), "f"), "new": np.ones((1, 1, 1, 2), "f"), "at": np.array([2])}
    result: Any = session.run(None, feeds)[0]
    return bool(result[0, 0, :, 0].tolist() == [0, 0, 1, 0])


def _sequence_kernels() -> Finding:
    library = kernel_library()
    if library is None:
        return Finding(_KERNELS, False, f"no library: {LOSS}", HOW_TO_GET, "cpu")
    if not library.operators:
        return Finding(_KERNELS, False, f"{library.path} is too old to name its operators", HOW_TO_GET, "cpu")
    others = ", ".join(name for name in library.sets if name != library.instruction_set)
    return Finding(_KERNELS, True, f"{library.instruction_set} in use, {others} possible; {library.path}", "", "cpu")


def _onnxruntime_cuda() -> Finding:
    command = f"pip uninstall onnxruntime; {_command('onnxruntime-gpu')}"
    if find_spec("onnxruntime") is None:
        return Finding(_CUDA, False, "onnxruntime is not installed", _command("onnxruntime-gpu"), "gpu")
    providers = import_module("onnxruntime").get_available_providers()
    if "CUDAExecutionProvider" not in providers:
        detail = f"this build of onnxruntime has only {', '.join(providers)}"
        return Finding(_CUDA, False, detail, command, "gpu")
    try:
        _run_scatter("CUDAExecutionProvider")
    except Exception as error:
        remedy = "see the NVIDIA driver below, and the CUDA and cuDNN versions onnxruntime-gpu asks for"
        return Finding(_CUDA, False, str(error), remedy, "gpu")
    return Finding(_CUDA, True, "ran an opset-24 graph that updates a cache", "", "gpu")


def _driver() -> Finding:
    # pydantic: only when the driver is asked
    from dspark_runtime.backends.tensorrt_device import driver_version_and_devices

    name, remedy = "NVIDIA driver", "https://www.nvidia.com/drivers, if this machine has an NVIDIA GPU"
    try:
        version, devices = driver_version_and_devices()
    except BackendError as error:
        return Finding(name, False, str(error), remedy, "gpu, rtx")
    detail = f"CUDA {version // 1000}.{version % 1000 // 10}, {devices} device(s)"
    return Finding(name, devices > 0, detail, "" if devices else remedy, "gpu, rtx")


def _importable(name: str, module: str, distribution: str, extra: str) -> Callable[[], Finding]:
    def check() -> Finding:
        parent = module.partition(".")[0]
        if find_spec(parent) is None or find_spec(module) is None:
            return Finding(name, False, f"the module {module} is not installed", _command(distribution), extra)
        version = getattr(import_module(module), "__version__", None)
        return Finding(name, True, f"{version or 'installed'}, can be imported", "", extra)

    return check


_BACKENDS: dict[str, Callable[[], Finding]] = {
    _CPU: _onnxruntime_cpu,
    _KERNELS: _sequence_kernels,
    _CUDA: _onnxruntime_cuda,
    "NVIDIA driver": _driver,
    "TensorRT": _importable("TensorRT", "tensorrt", "tensorrt", "gpu"),
    "cuda-core": _importable("cuda-core", "cuda.core", "cuda-core", "gpu"),
    "Polygraphy": _importable("Polygraphy", "polygraphy", "polygraphy", "gpu, rtx"),
    "TensorRT-RTX": _importable("TensorRT-RTX", "tensorrt_rtx", "tensorrt-rtx-cu13", "rtx"),
}


def _print(machine: dict[str, str], backends: list[Finding], packages: list[Finding]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(width=max(120, Console().width))
    for key, value in machine.items():
        console.print(f"{key:<13} {value}", highlight=False, markup=False)
    for title, findings in (("backend", backends), ("package", packages)):
        table = Table("", title, "for", "state", "to get it", box=None, pad_edge=False)
        for f in findings:
            table.add_row("ok" if f.works else "--", *map(escape, (f.name, f.needed_for, f.detail, f.remedy)))
        console.print()
        console.print(table, highlight=False)


def _print_engines(engines: list[EngineFinding]) -> None:
    typer.echo("")
    if not engines:
        typer.echo("engines: the bundle has none; `dspark-export compile BUNDLE` adds some")
    for engine in engines:
        typer.echo(f"{'ok' if engine.works else '--'} engine {engine.graph} ({engine.needs})")
        for reason in engine.reasons:
            typer.echo(f"   {reason}")
