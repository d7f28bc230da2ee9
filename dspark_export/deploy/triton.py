"""A model repository of Triton Inference Server, with what starts it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from dspark_export.deploy.contents import copy_runtime, packages, write_templates
from dspark_export.deploy.folder import new_folder
from dspark_export.deploy.options import DeployOptions
from dspark_serve.triton.asking import INPUTS, OUTPUTS

IMAGE = "nvcr.io/nvidia/tritonserver:24.12-py3"
"""The first images with Python 3.11 or later are those of Ubuntu 24.04."""


def write_triton(options: DeployOptions, out: Path) -> None:
    """Write the deployment into the new folder ``out``.

    Raises:
        DeploymentError: ``out`` is taken, or cannot be written.
    """
    settings, name = options.settings, options.name
    if not options.copy:
        settings = settings.model_copy(update={"bundle": str(Path(os.path.abspath(options.bundle)))})
    values = {
        "name": name,
        "inputs": INPUTS,
        "outputs": OUTPUTS,
        "parameters": {key: json.dumps(text, ensure_ascii=False) for key, text in settings.parameters().items()},
        "on_gpu": settings.backend != "onnxruntime",
        "device": settings.device,
        "image": IMAGE,
        "requirements": packages(settings.backend),
        "copied": options.copy,
        "bundle": settings.bundle,
        "exit_seconds": int(settings.drain_seconds) + 10,
    }
    model = f"models/{name}"
    places = {"config.pbtxt": f"{model}/config.pbtxt", "model.py": f"{model}/1/model.py"}
    with new_folder(out) as folder:
        write_templates("triton", folder, values, places)
        copy_runtime(folder / "python")
        if options.copy:
            shutil.copytree(options.bundle, folder / model / "1" / "bundle")
