"""A written deployment that runs, on ports of its own; for checks."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

from dspark_runtime.errors import BackendError

_PORTS = ("HTTP", "GRPC", "METRICS")


@dataclass
class Running:
    """``ports`` by kind, ``HTTP``, ``GRPC`` and ``METRICS``; ``process`` is the server's."""

    process: subprocess.Popen[bytes]
    ports: Mapping[str, int]
    output: IO[bytes]

    def log(self) -> str:
        """What the server has printed."""
        return os.pread(self.output.fileno(), 10_000_000, 0).decode(errors="replace")

    def ask(
        self, path: str, body: Mapping[str, Any] | None = None, timeout: float = 60, port: str = "HTTP"
    ) -> tuple[int, str]:
        """Status and body of the answer to an HTTP request: a POST if there is a ``body``."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.ports[port]}{path}",
            None if body is None else json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()


@contextmanager
def running(
    command: list[str], environment: Mapping[str, str], ready: str, patience: float = 300.0
) -> Iterator[Running]:
    """Start ``command`` and wait until ``GET ready`` is answered with 200; stops it at the end.

    The command finds its ports in the variables ``DSPARK_HTTP_PORT``, ``DSPARK_GRPC_PORT`` and ``DSPARK_METRICS_PORT``.

    Raises:
        BackendError: it ended before, or took longer than ``patience`` seconds; the message has its last lines.
    """
    ports = dict(zip(_PORTS, _free_ports(len(_PORTS)), strict=True))
    numbers = {f"DSPARK_{kind}_PORT": str(port) for kind, port in ports.items()}
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command, env={**os.environ, **environment, **numbers}, stdout=output, stderr=output, start_new_session=True
        )
        server = Running(process, ports, output)
        try:
            _wait(server, ready, time.monotonic() + patience)
            yield server
        finally:
            _stop(process)


def _wait(server: Running, ready: str, deadline: float) -> None:
    while True:
        if server.process.poll() is not None:
            raise BackendError(
                f"the server ended with code {server.process.returncode} before it was ready:\n{_tail(server)}"
            )
        try:
            if server.ask(ready, timeout=5)[0] == 200:
                return
        except OSError:  # nothing listens yet
            pass
        if time.monotonic() > deadline:
            raise BackendError(f"the server was not ready in time:\n{_tail(server)}")
        time.sleep(0.05)


def _tail(server: Running) -> str:
    lines = server.log().strip().splitlines()
    return "\n".join([line for line in lines if "Error: " in line][-5:] or lines[-15:])


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ask it to end; whatever is left of it after a minute is killed."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    try:
        return [opened.getsockname()[1] for opened in sockets]
    finally:
        for opened in sockets:
            opened.close()
