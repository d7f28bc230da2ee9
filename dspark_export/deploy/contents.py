"""What every deployment holds: files made from templates, the runtime, and what has to be installed for it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from importlib.metadata import requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jinja2
from packaging.requirements import Requirement

from dspark_runtime.backends.build_kernels import sources

NOWHERE_ELSE: Mapping[str, str] = {}
PACKAGES = ("dspark_runtime", "dspark_serve")
_TEMPLATES = Path(__file__).with_name("templates")


def write_templates(
    kind: str, folder: Path, values: Mapping[str, Any], places: Mapping[str, str] = NOWHERE_ELSE
) -> None:
    """Every file of ``templates/KIND``, with ``values`` put in; ``.sh`` files may be run.

    ``places``: paths of files by the template's name; others keep it.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES / kind), undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    )
    for name in environment.list_templates(filter_func=lambda name: "__pycache__" not in name):
        path = folder / places.get(name, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(environment.get_template(name).render(values), encoding="utf-8")
        if path.suffix == ".sh":
            path.chmod(0o755)


def copy_runtime(folder: Path) -> None:
    """This installation's runtime, and the sources of its kernels for those of the CPU elsewhere."""
    for package in PACKAGES:
        spec = find_spec(package)
        assert spec is not None and spec.origin is not None
        shutil.copytree(Path(spec.origin).parent, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    kernels, own = sources(), folder / "dspark_runtime" / "cpu"
    if kernels is not None and not own.exists():
        shutil.copytree(kernels, own, ignore=shutil.ignore_patterns("__pycache__", "tests"))


def packages(backend: str) -> list[str]:
    """:func:`requirements` without numpy, whose version Triton decides."""
    return [requirement for requirement in requirements(backend) if not requirement.startswith("numpy")]


def requirements(backend: str, serve: bool = False) -> list[str]:
    """What the runtime needs beside itself to run on ``backend``, and to serve over HTTP, as pip takes it.

    ONNX Runtime on the CPU has the version of this installation: exact texts are those of one version.
    """
    extra = {"onnxruntime": "cpu", "tensorrt-rtx": "rtx"}.get(backend, "gpu")
    found = [Requirement(text) for text in requires("dspark-runtime") or ()]
    extras = (extra, "serve") if serve else (extra,)
    wanted = [r for r in found if r.marker is None or any(r.marker.evaluate({"extra": name}) for name in extras)]
    pinned = {"onnxruntime": version("onnxruntime")} if extra == "cpu" else {}
    return [f"{r.name}=={pinned[r.name]}" if r.name in pinned else _without_marker(r) for r in wanted]


def _without_marker(requirement: Requirement) -> str:
    extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
    return f"{requirement.name}{extras}{requirement.specifier}"
