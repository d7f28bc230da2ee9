"""A tiny bundle, and the real Triton server of the wheel, installed once into ``.cache/triton``."""

from __future__ import annotations

import json
import os
import queue
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dspark_export.cli.main import app
from dspark_export.deploy import triton_wheel
from dspark_export.deploy.check import READY
from dspark_export.deploy.contents import packages
from dspark_export.deploy.running import Running, running
from dspark_runtime import Bundle
from dspark_runtime.errors import BackendError
from tests.shared.bundles import built_llama
from tests.shared.folders import CACHE

NAME = "tiny"
Start = Callable[[], AbstractContextManager["Server"]]
ROWS, QUEUE, LENGTH = 2, 1, 16384
CLIENT = Path(__file__).with_name("grpc_client.py")


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A built llama with random weights, float32."""
    return built_llama(tmp_path_factory.mktemp("deploy"), "none", max_position_embeddings=LENGTH)


@pytest.fixture(scope="session")
def opened(bundle: Path) -> Bundle:
    """The same, opened."""
    return Bundle.open(bundle, threads=1)


@pytest.fixture(scope="session")
def triton() -> Path:
    """The prepared folder of the server; skips where its packages or a fitting Python cannot be had."""
    folder = CACHE.parent / "triton"
    try:
        triton_wheel.prepare(folder, packages("onnxruntime"))
    except BackendError as error:
        pytest.skip(str(error))
    return folder


class Client:
    """A process with tritonclient, and one stream to the server."""

    def __init__(self, python: Path, port: int) -> None:
        command = [str(python), str(CLIENT), f"127.0.0.1:{port}", NAME]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def ask(self, identity: str, timeout_us: int | None = None, /, **inputs: Any) -> None:
        """Send a request, streamed unless ``inputs`` say otherwise."""
        self._say({"id": identity, "inputs": {"stream": True} | inputs, "timeout_us": timeout_us})

    def cancel(self) -> None:
        """Cancel all requests of the stream."""
        self._say("cancel")

    def next(self) -> dict[str, Any]:
        """The next response of any request."""
        return json.loads(self._lines.get(timeout=60))

    def rest(self, identity: str) -> list[dict[str, Any]]:
        """Outputs of all responses of a request up to its last one, which has a reason."""
        found = []
        while not found or "finish_reason" not in found[-1]:
            response = self.next()
            assert "error" not in response, response
            if response["id"] == identity:
                found.append(response["outputs"])
        return found

    def close(self) -> None:
        """End the process, which closes the stream."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it was killed
            self._process.stdin.close()
        self._process.wait(60)

    def kill(self) -> None:
        """Let the process die without a word to the server."""
        self._process.kill()

    def _say(self, command: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)


@dataclass
class Server:
    """A deployment in ``folder``, and the server that runs it."""

    folder: Path
    running: Running
    python: Path
    clients: ExitStack

    def generate(self, **inputs: Any) -> tuple[int, dict[str, Any]]:
        """Status and body of ``/generate``."""
        status, body = self.running.ask(f"/v2/models/{NAME}/generate", inputs)
        return status, json.loads(body)

    def client(self) -> Client:
        """A new client."""
        client = Client(self.python, self.running.ports["GRPC"])
        self.clients.callback(client.close)
        return client

    def metric(self, name: str, **labels: str) -> float:
        """A figure of Triton's metrics; 0 if it is not there."""
        _, text = self.running.ask("/metrics", port="METRICS")
        for found, value in re.findall(rf"^{name}\{{(.*)\}} (\S+)$", text, re.MULTILINE):
            if all(f'{key}="{wanted}"' in found for key, wanted in labels.items()):
                return float(value)
        return 0.0

    def reaches(self, wanted: float, name: str, **labels: str) -> bool:
        """Whether a figure becomes ``wanted`` within half a minute."""
        deadline = time.monotonic() + 30
        while self.metric(name, **labels) != wanted:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True

    def live(self) -> bool:
        """What the deployment's own probe says."""
        environment = os.environ | {"DSPARK_HTTP_PORT": str(self.running.ports["HTTP"])}
        return subprocess.run([self.folder / "live.sh"], env=environment, capture_output=True).returncode == 0


@pytest.fixture(scope="session")
def start(
    bundle: Path, triton: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[], AbstractContextManager[Server]]:
    """Deploys the bundle with the command line, and starts what that wrote."""

    @contextmanager
    def started() -> Iterator[Server]:
        folder = tmp_path_factory.mktemp("deployed") / "out"
        sizes = ["--rows", str(ROWS), "--queue", str(QUEUE), "--max-length", str(LENGTH), "--threads", "1"]
        arguments = ["deploy", str(bundle), "--target", "triton", "--out", str(folder), "--name", NAME, *sizes]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
        path = f"{triton / 'bin'}{os.pathsep}{os.environ['PATH']}"
        with running([str(folder / "start.sh")], {"PATH": path}, READY, 120) as process, ExitStack() as clients:
            yield Server(folder, process, triton_wheel.python_of(triton), clients)

    return started


@pytest.fixture(scope="module")
def server(start: Start) -> Iterator[Server]:
    """One server for the tests that leave it as it was."""
    with start() as started:
        yield started
