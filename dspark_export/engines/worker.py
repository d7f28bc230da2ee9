"""The compiler's process: one JSON request on stdin, one engine, JSON events on stdout.

Run as ``python -m dspark_export.engines.worker`` with ``POLYGRAPHY_USE_TENSORRT_RTX`` set for TensorRT-RTX. It imports
neither torch nor any more of this package than it needs.

Events: ``{"event": "progress", "phase", "step", "steps"}``, then one of ``{"event": "done", ...}``, with the facts of
the engine, and ``{"event": "failed", "kind", "message", "nodes": [...]}``; kinds are ``missing``, ``plugins``,
``parse`` and ``build``.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

from dspark_runtime.backends.tensorrt_plugins import load_plugins
from dspark_runtime.errors import CompilerMissing, EngineBuildError, EngineRefused


class _Events:
    """Writes events to what stdout was; stdout itself goes to stderr, since native libraries print."""

    def __init__(self) -> None:
        self._file: TextIO = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
        os.dup2(2, 1)

    def send(self, **event: Any) -> None:
        self._file.write(json.dumps(event) + "\n")
        self._file.flush()


def main() -> int:
    """Compile what stdin asks for; 0 if an answer was given, whatever it was."""
    events = _Events()
    request: dict[str, Any] = json.load(sys.stdin)
    try:
        events.send(event="done", **_compile(request, events))
    except _Failed as failure:
        events.send(event="failed", kind=failure.kind, message=str(failure), nodes=failure.nodes)
    except ImportError as error:
        events.send(event="failed", kind="missing", message=str(error), nodes=[])
    return 0


class _Failed(Exception):
    def __init__(self, kind: str, message: str, nodes: list[dict[str, str]] | None = None) -> None:
        super().__init__(message)
        self.kind, self.nodes = kind, nodes or []


def _compile(request: dict[str, Any], events: _Events) -> dict[str, Any]:
    began = time.perf_counter()
    trt = _import_compiler(request["flavour"])
    from polygraphy.backend.trt import EngineBytesFromNetwork
    from polygraphy.exception import PolygraphyException

    log = _capture_log(trt)
    _load_plugins(trt, request["plugins"])
    network = _NetworkFromGraph(trt, request["onnx"], request["plugins"]["form"])
    builder, definition = network()
    facts = _network_facts(trt, definition)
    config = _config(trt, request, _monitor(trt, events))
    cache = request["timing_cache"]
    try:
        plan = EngineBytesFromNetwork((builder, definition), config=config, save_timing_cache=cache)()
    except PolygraphyException as error:
        raise _Failed("build", "\n".join(log.errors) or str(error)) from error
    finally:
        folder = str(Path(request["onnx"]).parent)  # says nothing to whoever gets the bundle
        Path(request["log"]).write_text("".join(log.lines).replace(f"{folder}/", ""), encoding="utf-8")
    view = memoryview(plan)
    Path(request["plan"]).write_bytes(view)
    return {
        "version": trt.__version__,
        "cuda": _cuda_version(request["flavour"]),
        "targets": _targets(request),
        "seconds": time.perf_counter() - began,
        "peak_memory": _peak_memory(),
        "plan_bytes": view.nbytes,
        "network": facts,
        "listing": log.listing,
        "engine": None if request["flavour"] == "tensorrt-rtx" else _engine_facts(trt, plan, log),
        "scratch": log.scratch,
    }


def _load_plugins(trt: Any, plugins: dict[str, Any]) -> None:
    """Make the plugins of the graph known before it is parsed."""
    if plugins["form"] == "none":
        return

    try:
        if plugins["form"] == "library":
            load_plugins(trt, Path(plugins["library"]), plugins["names"])
        else:
            # onnx, pydantic: only for plugins compiled ahead of time
            from dspark_export.engines.aot_plugins import register_aot_plugins

            register_aot_plugins(plugins["ptx"])
    except (CompilerMissing, EngineBuildError, EngineRefused) as error:
        raise _Failed("plugins", str(error)) from error


def _import_compiler(flavour: str) -> Any:
    if flavour == "tensorrt-rtx":
        import tensorrt_rtx as trt
    else:
        import tensorrt as trt
    import polygraphy.config

    if (flavour == "tensorrt-rtx") != polygraphy.config.USE_TENSORRT_RTX:
        raise _Failed("missing", f"Polygraphy was not told to use {flavour}")
    return trt


def _capture_log(trt: Any) -> Any:
    """Make a logger Polygraphy hands to TensorRT: every message of the run, by severity, is kept here."""
    from polygraphy.backend.trt import util
    from polygraphy.logger import G_LOGGER

    kept = {trt.Logger.INTERNAL_ERROR: "F", trt.Logger.ERROR: "E", trt.Logger.WARNING: "W", trt.Logger.INFO: "I"}

    class Log(trt.ILogger):  # type: ignore[misc]
        """Lines for the log file, error messages, and what is said of the finished engine."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: list[str] = []
            self.errors: list[str] = []
            self.listing = ""
            self.scratch = 0

        def log(self, severity: Any, message: str) -> None:
            if severity in kept:
                self.lines.append(f"[{kept[severity]}] {message}\n")
            if severity in (trt.Logger.INTERNAL_ERROR, trt.Logger.ERROR):
                self.errors.append(message)
            elif message.startswith("Max Scratch Memory:"):
                self.scratch = int(message.split(":")[1].split()[0])
            elif message.lstrip().startswith("Layers:"):
                self.listing = message
                self.lines.append(f"[V] {message}\n")

    G_LOGGER.module_severity = G_LOGGER.CRITICAL
    util.TRT_LOGGER = Log()
    return util.TRT_LOGGER


class _NetworkFromGraph:
    """Polygraphy's network creation, and a parser whose errors keep their node.

    Polygraphy's own loader turns them into text.
    """

    def __init__(self, trt: Any, path: str, plugins: str) -> None:
        self._trt, self._path, self._plugins = trt, path, plugins

    def __call__(self) -> tuple[Any, Any]:
        from polygraphy.backend.trt import CreateNetwork
        from polygraphy.backend.trt.util import get_trt_logger

        # Networks of TensorRT-RTX and of TensorRT from 11 on are always strongly typed.
        flag = hasattr(self._trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")
        if self._plugins == "aot":
            flags = 1 << int(self._trt.NetworkDefinitionCreationFlag.PREFER_AOT_PYTHON_PLUGINS)
            flags |= 1 << int(self._trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED) if flag else 0
            builder = self._trt.Builder(get_trt_logger())  # Polygraphy has no parameter for the flag
            network = builder.create_network(flags)
        else:
            builder, network = CreateNetwork(strongly_typed=flag)()
        parser = self._trt.OnnxParser(network, get_trt_logger())
        if not parser.parse_from_file(self._path):
            errors = [parser.get_error(i) for i in range(parser.num_errors)]
            nodes = [
                {
                    "name": error.node_name(),
                    "operator": error.node_operator(),
                    "code": error.code().name,
                    "message": error.desc().strip(),
                }
                for error in errors
            ]
            raise _Failed("parse", "\n".join(node["message"] for node in nodes), nodes)
        self._parser = parser  # owns weights the network refers to
        return builder, network


def _network_facts(trt: Any, network: Any) -> dict[str, Any]:
    """How the network updates its caches and computes attention, before anything is compiled."""
    softmax, attention, decomposable, caches = 0, 0, 0, {}
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.SOFTMAX:
            softmax += 1
        elif layer.type == trt.LayerType.ATTENTION_INPUT:
            attention += 1
            layer.__class__ = trt.IAttentionInputLayer
            decomposable += bool(layer.attention.decomposable)
        elif layer.type == trt.LayerType.KV_CACHE_UPDATE:
            caches[layer.get_output(0).name] = layer.get_input(0).name
    return {"softmax": softmax, "attention": attention, "decomposable": decomposable, "caches": caches}


def _engine_facts(trt: Any, plan: Any, logger: Any) -> dict[str, Any]:
    """The same facts as the listing has, from the engine itself: TensorRT compiles where a GPU can load it."""
    engine = trt.Runtime(logger).deserialize_cuda_engine(plan)
    if engine is None:
        raise _Failed("build", "the engine cannot be loaded by the compiler that made it")
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
    profiles = range(engine.num_optimization_profiles)
    inspector = engine.create_engine_inspector()
    layers = json.loads(inspector.get_engine_information(trt.LayerInformationFormat.JSON))["Layers"]
    return {
        "layers": [layer for layer in layers if isinstance(layer, dict)],
        "aliases": {name: engine.get_aliased_input_tensor(name) for name in names if name not in inputs},
        "shapes": {
            name: [[list(dims) for dims in engine.get_tensor_profile_shape(name, p)] for p in profiles]
            for name in inputs
        },
    }


def _targets(request: dict[str, Any]) -> list[str]:
    """Compute capabilities the engine is for; empty: the default of TensorRT-RTX."""
    if request["flavour"] == "tensorrt-rtx":
        given: list[str] = request["compute_capabilities"]
        return given
    if request["hardware_compatible"] == "ampere-plus":
        return ["8.0", "8.6", "8.9", "9.0", "10.0", "12.0"]
    # pydantic: only when the GPU is asked
    from dspark_runtime.backends.tensorrt_device import this_device

    device = this_device()
    return [] if device is None else [device.capability]


def _cuda_version(flavour: str) -> str | None:
    """Major version of CUDA that the installed wheels are for, by their name."""
    prefix = flavour.replace("-", "_")
    for distribution in metadata.distributions():
        found = re.fullmatch(rf"{prefix}_cu(\d+)", re.sub("-", "_", (distribution.name or "").lower()))
        if found:
            return found[1]
    return None


def _config(trt: Any, request: dict[str, Any], monitor: Any) -> Any:
    from polygraphy.backend.trt import CreateConfig, Profile

    profiles = []
    for shapes in request["shapes"]:
        profile = Profile()
        for name, (low, likely, high) in shapes.items():
            profile.add(name, min=low, opt=likely, max=high)
        profiles.append(profile)
    options: dict[str, Any] = {
        "profiles": profiles,
        "profiling_verbosity": trt.ProfilingVerbosity.DETAILED,  # names ONNX nodes in the finished engine
        "progress_monitor": monitor,
        "refittable": request["refittable"],
        "strip_plan": request["strip_weights"],
    }
    if request["flavour"] == "tensorrt-rtx":
        from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

        targets = [tuple(map(int, target.split("."))) for target in request["compute_capabilities"]]
        return CreateConfigRTX(compute_capabilities=targets or None, **options)
    levels = {"ampere-plus": "AMPERE_PLUS", "same-compute-capability": "SAME_COMPUTE_CAPABILITY"}
    if (level := levels.get(request["hardware_compatible"])) is not None:
        options["hardware_compatibility_level"] = getattr(trt.HardwareCompatibilityLevel, level)
    if request["version_compatible"]:
        # The lean runtime inside a plan would be host code, which the runtime never lets an engine bring along.
        options |= {"version_compatible": True, "exclude_lean_runtime": True}
    return CreateConfig(load_timing_cache=request["timing_cache"], **options)


def _monitor(trt: Any, events: _Events) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Sends every step of every phase; phases nest."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._steps: dict[str, int] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self._steps[phase] = steps
            events.send(event="progress", phase=phase, step=0, steps=steps)

        def step_complete(self, phase: str, step: int) -> bool:
            events.send(event="progress", phase=phase, step=step + 1, steps=self._steps.get(phase, 0))
            return True

        def phase_finish(self, phase: str) -> None:
            steps = self._steps.pop(phase, 0)
            events.send(event="progress", phase=phase, step=steps, steps=steps)

    return Monitor()


def _peak_memory() -> int:
    """Bytes this process had in memory at most.

    Not ``ru_maxrss``: on Linux that starts with the peak of the process that started this one.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    sys.exit(main())
