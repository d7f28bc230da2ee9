"""Starts what was written and asks it one question."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from dspark_export.deploy import triton_wheel
from dspark_export.deploy.contents import packages
from dspark_export.deploy.options import DeployOptions
from dspark_export.deploy.running import running
from dspark_runtime.backends.build_kernels import cache
from dspark_runtime.errors import BackendError

READY = "/v2/health/ready"


def ask_once(options: DeployOptions, folder: Path) -> str:
    """The text the server gives, as JSON; tritonserver is the one on the PATH, or the wheel's.

    Raises:
        BackendError: there is no server, it does not start, or it does not answer.
    """
    path = os.environ.get("PATH", "")
    if shutil.which("tritonserver") is None:
        path = f"{triton_wheel.prepare(cache() / 'triton', packages(options.settings.backend))}{os.pathsep}{path}"
    prompt: dict[str, Any] = {"text_input": "Once upon a time"} if options.has_tokenizer else {"input_ids": [0]}
    with running([str(folder.absolute() / "start.sh")], {"PATH": path}, READY) as server:
        status, body = server.ask(f"/v2/models/{options.name}/generate", prompt | {"max_tokens": 8})
    if status != 200:
        raise BackendError(f"the server started, and answered with {status}: {body}")
    answer: dict[str, Any] = json.loads(body)
    return json.dumps(answer["text_output"] if options.has_tokenizer else answer["token_ids"])
