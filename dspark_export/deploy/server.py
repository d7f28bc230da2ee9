"""The HTTP server with OpenAI's API in a container of its own, alone or as a runtime of KServe."""

from __future__ import annotations

import math
import os
import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

from dspark_export.deploy.contents import copy_runtime, requirements, write_templates
from dspark_export.deploy.folder import new_folder
from dspark_export.deploy.options import DeployOptions
from dspark_runtime.bundle.files import BundleFiles
from dspark_runtime.errors import UsageError
from dspark_runtime.serving.memory import cache_bytes
from dspark_runtime.serving.options import DEFAULT_CAPACITY

IMAGE = "python:3.12-slim-bookworm"
DRAIN_SECONDS = 30
STOP_SECONDS = 5
"""Between being left out of the endpoints of Kubernetes and SIGTERM."""
_PROCESS_BYTES = 2**29  # Python, its libraries, and what passes compute


@dataclass(frozen=True)
class KServeOptions:
    """``image``: what the container is pushed as. ``storage_uri``: where KServe gets the bundle; None: in the image."""

    image: str
    storage_uri: str | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w./:@-]+", self.image):
            raise UsageError(f"--image {self.image!r}: give a name such as registry.example/models/qwen3:1")
        if self.storage_uri is not None and not re.fullmatch(r"[a-z0-9]+://\S+", self.storage_uri):
            raise UsageError(
                f"--storage-uri {self.storage_uri!r}: give one such as s3://bucket/qwen3 or pvc://claim/qwen3"
            )


def write_server(options: DeployOptions, out: Path, kserve: KServeOptions | None = None) -> None:
    """Write the deployment into the new folder ``out``.

    Raises:
        DeploymentError: ``out`` is taken, or cannot be written.
    """
    settings = options.settings
    manifest = BundleFiles.open(options.bundle).manifest
    copied = options.copy and not (kserve and kserve.storage_uri)
    capacity = min(settings.max_length or DEFAULT_CAPACITY, manifest.model.max_positions)
    size = sum(entry.size for entry in manifest.files.values())
    memory = 2 * size + cache_bytes(manifest, settings.rows, capacity) + _PROCESS_BYTES
    on_gpu = settings.backend != "onnxruntime"
    stop = STOP_SECONDS if kserve else 0
    kubernetes_name = re.sub(r"[^a-z0-9]+", "-", options.name.lower()).strip("-")
    if not kubernetes_name[:1].isalpha():
        kubernetes_name = f"dspark-{kubernetes_name}"
    values = {
        "name": options.name,
        "image": IMAGE,
        "on_gpu": on_gpu,
        "copied": copied,
        "bundle": "$here/bundle" if copied else os.path.abspath(options.bundle),
        "arguments": _arguments(options),
        "requirements": requirements(settings.backend, serve=True),
        "drain_seconds": DRAIN_SECONDS,
        "stop_seconds": stop,
        "grace_seconds": stop + DRAIN_SECONDS + 15,
        "kserve": kserve is not None,
        "registry_image": kserve and kserve.image,
        "storage_uri": kserve and kserve.storage_uri,
        "runtime_name": f"dspark-{kubernetes_name.removeprefix('dspark-')}",
        "kubernetes_name": kubernetes_name,
        "cpus": settings.threads or 4,
        "memory_gib": math.ceil(memory / 2**30),
        "rows": settings.rows,
    }
    with new_folder(out) as folder:
        write_templates("server", folder, values)
        if kserve is not None:
            write_templates("kserve", folder, values)
        copy_runtime(folder / "python")
        if copied:
            shutil.copytree(options.bundle, folder / "bundle")


def _arguments(options: DeployOptions) -> list[str]:
    """Of ``dspark-serve``, what is not its default included."""
    settings = options.settings
    words = ["--served-name", options.name, "--drain", DRAIN_SECONDS]
    for name in ("rows", "queue", "chunk", "speculate", "max_length", "threads", "backend", "device"):
        if (value := getattr(settings, name)) is not None:
            words += [f"--{name.replace('_', '-')}", value]
    if settings.exact is not None:
        words.append("--exact" if settings.exact else "--no-exact")
    return [shlex.quote(str(word)) for word in words]
