"""Checks an engine before its plan reaches TensorRT, because loading a plan executes code in it.

The checks, in order: the plan is the file the manifest describes, it was compiled from the bundle's graph, the
installed TensorRT accepts its version, and so does this GPU. TensorRT's own validity check does not notice altered
plans.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dspark_runtime.backends.plugin_files import LIBRARY, how_to_build
from dspark_runtime.bundle.engine_entry import EngineEntry
from dspark_runtime.bundle.engine_names import VERSION
from dspark_runtime.bundle.files import BundleFiles, check_regular_file
from dspark_runtime.bundle.manifest import Manifest
from dspark_runtime.bundle.plan_errors import plan_error
from dspark_runtime.errors import (
    EngineDeviceMismatch,
    EngineOutdated,
    EnginePluginMismatch,
    EngineRefused,
    EngineVersionMismatch,
    EngineWithoutDevice,
)

RTX_DEFAULT_TARGETS = ("8.0", "8.6", "8.9", "12.0", "12.1")
"""Compute capabilities a TensorRT-RTX engine runs on if none was asked for."""

_RTX_MAGIC = b"vtrt"
_RTX_VERSION = slice(24, 28)
MIN_DRIVER = {"12": 12000, "13": 13000}
"""CUDA version the driver must offer, by the major version of CUDA the engine's flavour was built with."""


@dataclass(frozen=True)
class DeviceFacts:
    """A GPU: compute capability such as ``8.6``, name, and the CUDA version of its driver (13000 for 13.0)."""

    capability: str
    name: str
    driver: int


def checked_plan(files: BundleFiles, engine: EngineEntry) -> bytes:
    """The plan of ``engine``, read once and checked: the bytes returned are the bytes that were hashed.

    Raises:
        PlanDamaged: it is not the file the manifest describes; derived types say how it differs.
        EngineOutdated: it was compiled from another graph than the bundle's.
        EngineVersionMismatch: its own header names another version than the manifest.
    """
    check_regular_file(files.root, engine.file)
    plan = (files.root / engine.file).read_bytes()
    require_plan(plan, engine.file, files.manifest)
    require_graph(engine, files.manifest)
    require_header(plan, engine)
    return plan


def require_plan(plan: bytes, file: str, manifest: Manifest) -> None:
    """Raise a PlanDamaged unless ``plan`` is byte for byte what ``manifest`` says of ``file``."""
    entry = manifest.files[file]
    if len(plan) == entry.size and hashlib.sha256(plan).hexdigest() == entry.sha256:
        return
    raise plan_error(file, entry, len(plan), hashlib.sha256(plan).hexdigest(), manifest)


def require_graph(engine: EngineEntry, manifest: Manifest) -> None:
    """Raise EngineOutdated if the bundle's graph is not the one the engine was compiled from."""
    graph = next(g for g in manifest.graphs if g.name == engine.graph and g.variant == "standard")
    if manifest.files[graph.file].sha256 != engine.graph_sha256:
        raise EngineOutdated(
            f"the {engine.flavour} engine of {engine.graph} was compiled from another graph than the bundle's "
            f"{graph.file}; compile the bundle again"
        )


def require_header(plan: bytes, engine: EngineEntry) -> None:
    """Raise EngineVersionMismatch if a TensorRT-RTX plan says of itself that another version made it."""
    if engine.flavour != "tensorrt-rtx":
        return
    if plan[:4] != _RTX_MAGIC:
        raise EngineVersionMismatch(
            f"the plan {engine.file} does not begin like one of tensorrt-rtx {engine.version}; compile the bundle again"
        )
    made = ".".join(str(number) for number in plan[_RTX_VERSION])
    if made != ".".join(str(int(number) % 256) for number in engine.version.split(".")):  # a byte each
        raise EngineVersionMismatch(
            f"the plan {engine.file} was made by tensorrt-rtx {made}, the manifest says {engine.version}; "
            "compile the bundle again"
        )


def require_version(engine: EngineEntry, installed: str | None) -> None:
    """Raise EngineVersionMismatch unless the ``installed`` TensorRT (None: none) takes the engine."""
    if installed is None:
        raise EngineVersionMismatch(
            f"the engine of {engine.graph} needs {engine.flavour} {engine.version}, which is not installed; "
            f"run `{install_command(engine)}`"
        )
    if installed == engine.version:
        return
    if engine.version_compatible and _later(installed, engine.version):
        return
    raise EngineVersionMismatch(
        f"the engine of {engine.graph} needs {engine.flavour} {engine.version}, installed is {installed}; "
        f"run `{install_command(engine)}` or compile the bundle again with the installed version"
    )


def require_plugins(engine: EngineEntry, library: Path | None) -> None:
    """Raise EnginePluginMismatch unless this runtime's plugins are those of the engine.

    ``library`` is the plugin library, None where there is none. The version counts in every form: it says what a
    plugin's inputs and outputs mean.
    """
    for name, version in engine.plugins.items():
        if version != VERSION:
            raise EnginePluginMismatch(
                f"the engine of {engine.graph} has plugin {name} of version {version}, this runtime's is {VERSION}; "
                "compile the bundle again with this version"
            )
    if engine.plugin_form == "library" and library is None:
        raise EnginePluginMismatch(
            f"the engine of {engine.graph} needs the plugins {', '.join(engine.plugins)} of {LIBRARY}, which was not "
            f"found; {how_to_build(LIBRARY)}, or compile the bundle again with --plugins aot"
        )


def require_device(engine: EngineEntry, device: DeviceFacts | None) -> None:
    """Raise unless ``device`` (None: there is none) can run the engine.

    Raises:
        EngineWithoutDevice: no GPU, or a driver that is too old.
        EngineDeviceMismatch: the engine was compiled for other compute capabilities.
    """
    if device is None:
        raise EngineWithoutDevice(
            f"the engine of {engine.graph} needs an NVIDIA GPU of compute capability {', '.join(targets(engine))} and "
            "its driver, this machine has none; run the bundle's graphs with ONNX Runtime, or move to such a machine"
        )
    if device.driver < MIN_DRIVER.get(engine.cuda or "", 0):
        needed = MIN_DRIVER[engine.cuda or ""]
        raise EngineWithoutDevice(
            f"the engine of {engine.graph} needs a driver for CUDA {needed // 1000}.{needed % 1000 // 10}, that of "
            f"{device.name} offers {device.driver // 1000}.{device.driver % 1000 // 10}; update the NVIDIA driver"
        )
    if not runs_on(engine, device.capability):
        raise EngineDeviceMismatch(
            f"the engine of {engine.graph} is for compute capability {', '.join(targets(engine))}, {device.name} has "
            f"{device.capability}; {_other_way(engine, device.capability)}"
        )


def runs_on(engine: EngineEntry, capability: str) -> bool:
    """Whether a GPU of ``capability`` is among those the engine was compiled for."""
    if capability in targets(engine):
        return True
    given, major = [t.split(".") for t in targets(engine)], capability.split(".")[0]
    if engine.hardware_compatible == "ampere-plus":
        return int(major) >= 8
    return not engine.targets and int(major) > max(int(t[0]) for t in given)  # later GPUs are part of the default


def targets(engine: EngineEntry) -> tuple[str, ...]:
    """Compute capabilities of the engine, those of the default spelled out."""
    return engine.targets or RTX_DEFAULT_TARGETS


def refusals(
    engine: EngineEntry, manifest: Manifest, installed: str | None, device: DeviceFacts | None, library: Path | None
) -> list[str]:
    """Every reason why ``engine`` cannot run here; empty if it can. The plan's bytes are not looked at.

    ``installed`` is the version of its flavour, ``library`` the plugin library, None where there is none.
    """
    found = []
    checks: tuple[Callable[[], None], ...] = (
        partial(require_graph, engine, manifest),
        partial(require_version, engine, installed),
        partial(require_plugins, engine, library),
        partial(require_device, engine, device),
    )
    for check in checks:
        try:
            check()
        except EngineRefused as error:
            found.append(str(error))
    return found


def install_command(engine: EngineEntry) -> str:
    """What installs the TensorRT the engine needs."""
    suffix = f"-cu{engine.cuda}" if engine.cuda else ""
    return f"pip install {engine.flavour}{suffix}=={engine.version}"


def _other_way(engine: EngineEntry, capability: str) -> str:
    if engine.flavour == "tensorrt":
        return "compile the bundle on this machine, or with --hardware-compatible"
    if capability in ("7.5", *RTX_DEFAULT_TARGETS):
        return f"compile the bundle again with --compute-capability {capability}"
    return "TensorRT-RTX is not for this GPU: compile the bundle with --backend tensorrt"


def _later(installed: str, built: str) -> bool:
    """Whether ``installed`` is a later version with the same major number."""
    new, old = ([int(part) for part in version.split(".")] for version in (installed, built))
    return new[0] == old[0] and new > old
