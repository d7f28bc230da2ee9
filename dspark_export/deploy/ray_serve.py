"""A Ray Serve application: several copies of a model behind one address."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from dspark_export.deploy.contents import copy_runtime, requirements, write_templates
from dspark_export.deploy.folder import new_folder
from dspark_export.deploy.options import DeployOptions
from dspark_export.deploy.server import DRAIN_SECONDS


def write_ray(options: DeployOptions, out: Path, replicas: int) -> None:
    """Write the deployment, with this many copies of the model, into the new folder ``out``.

    Raises:
        DeploymentError: ``out`` is taken, or cannot be written.
    """
    settings = options.settings
    cpus, on_gpu = settings.threads or 1, settings.backend != "onnxruntime"
    sizes = {"rows": settings.rows, "capacity": settings.max_length, "queue": settings.queue, "chunk": settings.chunk}
    written = {
        "name": options.name,
        "bundle": "bundle" if options.copy else os.path.abspath(options.bundle),
        "replicas": replicas,
        "service": sizes | {"speculate": settings.speculate},
        "opening": {"threads": cpus if not on_gpu else None, "exact": settings.exact, "backend": settings.backend},
        "drain": DRAIN_SECONDS,
        "actor": {"num_cpus": cpus, "num_gpus": int(on_gpu)},
    }
    values = {
        "name": options.name,
        "requirements": requirements(settings.backend, serve=True),
        "replicas": replicas,
        "cpus": cpus,
        "on_gpu": on_gpu,
    }
    with new_folder(out) as folder:
        write_templates("ray", folder, values)
        (folder / "settings.json").write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
        copy_runtime(folder / "python")
        if options.copy:
            shutil.copytree(options.bundle, folder / "bundle")
