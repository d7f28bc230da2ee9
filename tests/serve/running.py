"""Real servers on real sockets, in a thread of the test's process."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn
from openai import OpenAI

from dspark_runtime import Bundle, Service, ServiceOptions
from dspark_serve.app import make_app
from dspark_serve.heads import http_protocol
from dspark_serve.metrics import Metrics
from dspark_serve.serving import Served

NAME = "tiny"


@dataclass
class Running:
    """A server that runs."""

    service: Service
    listener: socket.socket

    @property
    def port(self) -> int:
        return int(self.listener.getsockname()[1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, key: str = "none", **options: Any) -> OpenAI:
        """OpenAI's own client, which does not ask twice."""
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60, **options)

    def idle(self, seconds: float = 30) -> bool:
        """Whether nothing runs or waits, once it does, or after ``seconds``."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            stats = self.service.stats()
            if not stats.running and not stats.waiting:
                return True
            time.sleep(0.01)
        return False


@contextmanager
def running(
    bundle: Bundle,
    options: ServiceOptions | None = None,
    metrics: Metrics | None = None,
    http: Any = None,
    **settings: Any,
) -> Iterator[Running]:
    """A server over a service of its own; ``settings`` are those of :func:`make_app`."""
    served = Served.start(bundle, options or ServiceOptions(rows=4, queue=16, capacity=256), NAME, metrics)
    service, http = served.service, http or http_protocol()
    with service:
        app = make_app(served, **settings)
        listener = socket.create_server(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, http=http, log_level="warning", timeout_graceful_shutdown=5))
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        try:
            yield Running(service, listener)
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()
