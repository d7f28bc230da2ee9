"""Starts what was written and asks it one question."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from dspark_export.deploy import triton_wheel
from dspark_export.deploy.contents import packages
from dspark_export.deploy.options import DeployOptions
from dspark_export.deploy.running import Running, running
from dspark_runtime.backends.build_kernels import cache
from dspark_runtime.errors import BackendError

READY = "/v2/health/ready"
SERVER_READY = "/health/ready"
_PROMPT = "Once upon a time"


def ask_triton(options: DeployOptions, folder: Path) -> str:
    """The text Triton gives, as JSON; tritonserver is the one on the PATH, or the wheel's.

    Raises:
        BackendError: there is no server, it does not start, or it does not answer.
    """
    path = os.environ.get("PATH", "")
    if shutil.which("tritonserver") is None:
        path = f"{triton_wheel.prepare(cache() / 'triton', packages(options.settings.backend))}{os.pathsep}{path}"
    prompt: dict[str, Any] = {"text_input": _PROMPT} if options.has_tokenizer else {"input_ids": [0]}
    with running([str(folder.absolute() / "start.sh")], {"PATH": path}, READY) as server:
        answer = _asked(server, f"/v2/models/{options.name}/generate", prompt | {"max_tokens": 8})
    return json.dumps(answer["text_output"] if options.has_tokenizer else answer["token_ids"])


def ask_server(options: DeployOptions, folder: Path) -> str:
    """The text the HTTP server gives, as JSON; it runs with this installation's Python.

    Raises:
        BackendError: it does not start, or does not answer.
    """
    body = {"model": options.name, "prompt": _PROMPT, "max_tokens": 8, "temperature": 0}
    environment = {"PYTHON": sys.executable, "DSPARK_API_KEY": ""}
    with running([str(folder.absolute() / "start.sh")], environment, SERVER_READY) as server:
        return json.dumps(_asked(server, "/v1/completions", body)["choices"][0]["text"])


def _asked(server: Running, path: str, body: dict[str, Any]) -> dict[str, Any]:
    status, text = server.ask(path, body)
    if status != 200:
        raise BackendError(f"the server started, and answered with {status}: {text}")
    answer: dict[str, Any] = json.loads(text)
    return answer
