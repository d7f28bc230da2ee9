"""``dspark-export doctor``: what is installed, which backends work, and how to get what is missing."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

_DISTRIBUTION = "dspark-export"
_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "asimddp", "i8mm")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. ``remedy`` is what to do, empty when all is well."""

    name: str
    works: bool
    detail: str
    remedy: str = ""


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False) -> None:
    """Say what is installed, which backends work, and how to get the rest. Exit code 8 if no backend works."""
    machine = _machine()
    backends = [_guarded(name, check) for name, check in _BACKENDS.items()]
    packages = _packages()
    healthy = any(f.works for f in backends if f.name in RUNNABLE)
    if as_json:
        found = {"healthy": healthy, "machine": machine}
        found |= {"backends": [asdict(f) for f in backends], "packages": [asdict(f) for f in packages]}
        typer.echo(json.dumps(found))
    else:
        _print(machine, backends, packages)
    if not healthy:
        raise typer.Exit(8)


def _machine() -> dict[str, str]:
    facts = {"python": platform.python_version(), "platform": platform.platform(), "cpu": platform.machine()}
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return facts
    names = re.findall(r"^model name\s*:\s*(.*)$", text, re.MULTILINE)
    flags = set(" ".join(re.findall(r"^(?:flags|Features)\s*:\s*(.*)$", text, re.MULTILINE)[:1]).split())
    if names:
        facts["cpu"] = names[0]
    facts["cores"] = str(len(re.findall(r"^processor\s*:", text, re.MULTILINE)))
    facts["instructions"] = " ".join(flag for flag in _FLAGS if flag in flags) or "none of note"
    return facts


def _packages() -> list[Finding]:
    """Every declared dependency with its installed version."""
    try:
        declared = metadata.requires(_DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return [Finding(_DISTRIBUTION, False, "not installed", f"pip install {_DISTRIBUTION}")]
    findings = []
    for requirement in declared:
        wanted, _, marker = requirement.partition(";")
        name = re.split(r"[^A-Za-z0-9._-]", wanted.strip(), maxsplit=1)[0]
        extra = re.search(r"extra == ['\"](\w+)['\"]", marker)
        group = f"{_DISTRIBUTION}[{extra.group(1)}]" if extra else _DISTRIBUTION
        try:
            version = metadata.version(name)
            findings.append(Finding(name, True, f"{version} (wanted {wanted.strip().removeprefix(name) or 'any'})"))
        except metadata.PackageNotFoundError:
            if extra is None or extra.group(1) != "dev":
                findings.append(Finding(name, extra is not None, "not installed", f'pip install "{group}"'))
    return findings


def _guarded(name: str, check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except Exception as error:
        return Finding(name, False, f"{type(error).__name__}: {error}", "see the message")


def _onnxruntime_cpu() -> Finding:
    """Really runs an opset-24 graph that updates a cache in place."""
    name = "ONNX Runtime, CPU"
    if find_spec("onnxruntime") is None:
        return Finding(name, False, "onnxruntime is not installed", f'pip install "{_DISTRIBUTION}[cpu]"')
    import onnxruntime as ort

    if find_spec("onnx") is None:
        return Finding(name, True, f"onnxruntime {ort.__version__} imports; onnx is missing, so nothing was run")
    import numpy as np
    from onnx import TensorProto, helper

    cache: list[str | int | None] = ["batch", 1, "capacity", 2]
    graph = helper.make_graph(
        [helper.make_node("TensorScatter", ["past", "new", "at"], ["present"], axis=2)],
        "doctor",
        [
            helper.make_tensor_value_info("past", TensorProto.FLOAT, cache),
            helper.make_tensor_value_info("new", TensorProto.FLOAT, ["batch", 1, "tokens", 2]),
            helper.make_tensor_value_info("at", TensorProto.INT64, ["batch"]),
        ],
        [helper.make_tensor_value_info("present", TensorProto.FLOAT, cache)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
    remedy = f'pip install --upgrade "{_DISTRIBUTION}[cpu]"'
    options = ort.SessionOptions()
    options.log_severity_level = 3
    try:
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        feeds = {"past": np.zeros((1, 1, 4, 2), "f"), "new": np.ones((1, 1, 1, 2), "f"), "at": np.array([2])}
        written = session.run(None, feeds)[0][0, 0, :, 0].tolist() == [0, 0, 1, 0]
    except Exception as error:
        return Finding(name, False, f"onnxruntime {ort.__version__} cannot run opset 24: {error}", remedy)
    detail = f"onnxruntime {ort.__version__} runs an opset-24 graph"
    return Finding(name, True, detail) if written else Finding(name, False, f"{detail}, with a wrong result", remedy)


def _onnxruntime_cuda() -> Finding:
    name = "ONNX Runtime, CUDA"
    remedy = f'pip uninstall onnxruntime; pip install "{_DISTRIBUTION}[gpu]", on a machine with an NVIDIA driver'
    if find_spec("onnxruntime") is None:
        return Finding(name, False, "onnxruntime is not installed", remedy)
    import onnxruntime as ort

    if "CUDAExecutionProvider" in ort.get_available_providers():
        return Finding(name, True, "the provider is there; this version of dspark-export runs graphs on the CPU only")
    return Finding(name, False, f"this build of onnxruntime has {', '.join(ort.get_available_providers())}", remedy)


def _driver() -> Finding:
    version = Path("/proc/driver/nvidia/version")
    if version.exists():
        return Finding("NVIDIA driver", True, version.read_text(encoding="utf-8").splitlines()[0])
    return Finding("NVIDIA driver", False, "none on this machine", "install NVIDIA's driver, if there is such a GPU")


def _importable(name: str, module: str, remedy: str) -> Callable[[], Finding]:
    def check() -> Finding:
        if find_spec(module) is None:
            return Finding(name, False, f"the module {module} is not installed", remedy)
        return Finding(name, True, "installed; engines are not built by this version")

    return check


_BACKENDS: dict[str, Callable[[], Finding]] = {
    "ONNX Runtime, CPU": _onnxruntime_cpu,
    "ONNX Runtime, CUDA": _onnxruntime_cuda,
    "NVIDIA driver": _driver,
    "TensorRT": _importable("TensorRT", "tensorrt", f'pip install "{_DISTRIBUTION}[gpu]"'),
    "TensorRT-RTX": _importable("TensorRT-RTX", "tensorrt_rtx", f'pip install "{_DISTRIBUTION}[rtx]"'),
}
RUNNABLE = ("ONNX Runtime, CPU",)
"""Backends this version generates with."""


def _print(machine: dict[str, str], backends: list[Finding], packages: list[Finding]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(width=max(100, Console().width))
    console.print("  ".join(f"{key}: {value}" for key, value in machine.items()), highlight=False)
    for title, findings in (("backend", backends), ("package", packages)):
        table = Table("", title, "state", "to get it", box=None, pad_edge=False)
        for finding in findings:
            table.add_row(
                "ok" if finding.works and not finding.remedy else "--",
                finding.name,
                *map(escape, (finding.detail, finding.remedy)),
            )
        console.print(table, highlight=False)
