"""Runs the server: opens a bundle, answers until it is told to stop, and drains.

SIGTERM or SIGINT: no new requests are taken (503, and ``/health/ready`` says so), those there are may end within the
time for draining, the rest is cancelled. A second signal cancels at once. If the engine fails twice in a row, the
process ends with exit code 8 for its supervisor.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import uvicorn

from dspark_runtime import Bundle, PhraseOptions, ServiceOptions
from dspark_runtime.errors import BackendError, ServiceUnhealthy, UsageError
from dspark_runtime.serving.memory import cache_bytes
from dspark_serve.access import LOCAL_HOSTS, AccessRules, ApiKeys, RateLimits
from dspark_serve.app import make_app
from dspark_serve.heads import http_protocol
from dspark_serve.serving import Served
from dspark_serve.tracing import Traced

_log = logging.getLogger("dspark_serve")

_LOOPBACK = ("127.", "localhost", "::1")
_CLOSING_SECONDS = 5
"""Connections that do not end by themselves once everything is answered are closed after this long."""


@dataclass(frozen=True)
class ServerOptions:
    """Where and to whom a bundle is served.

    Args:
        host: address to listen at.
        port: 0 for any that is free.
        name: of the model in requests; None for the name of the bundle's folder.
        api_keys: file of API keys; see :meth:`ApiKeys.read`.
        origins: of web pages whose scripts may ask.
        rate_limit: requests a minute of each key, or of each address without keys; 0 for any number.
        drain: seconds that running requests have to end when the server stops.
        traces: make OpenTelemetry spans.
        service: sizes and rules of the service.
        phrases: what is remembered of requests to draft from; its file is written when the server stops.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    name: str | None = None
    api_keys: Path | None = None
    origins: tuple[str, ...] = ()
    rate_limit: int = 0
    drain: float = 30.0
    traces: bool = False
    service: ServiceOptions = field(default_factory=ServiceOptions)
    phrases: PhraseOptions = field(default_factory=PhraseOptions)


def serve(
    path: Path,
    options: ServerOptions,
    say: Callable[[str], None] = print,
    *,
    threads: int | None = None,
    exact: bool | None = None,
    backend: str = "onnxruntime",
    device: int = 0,
) -> None:
    """Serve the bundle at ``path`` until a signal comes. ``say`` is told what a person wants to know.

    Raises:
        UsageError: no API key in the file, the address cannot be had, or OpenTelemetry is not installed.
        CapacityError: the caches do not fit the memory.
        BundleError: no bundle, or one that cannot be served.
        ServiceUnhealthy: the engine failed.
    """
    keys = ApiKeys.read(options.api_keys)
    hosts = LOCAL_HOSTS if options.host.startswith(_LOOPBACK) and not keys else None
    rules = AccessRules(keys, RateLimits(options.rate_limit), hosts)
    with _bound(options.host, options.port) as listener:
        capacity = options.service.capacity
        bundle = Bundle.open(
            path,
            threads=threads,
            exact=exact,
            backend=backend,
            device=device,
            capacity=capacity,
            phrases=options.phrases,
        )
        name = options.name or Path(path).resolve().name.removesuffix(".dspark")
        served = Served.start(bundle, options.service, name, Traced() if options.traces else None)
        try:
            say(memory_text(served))
            _try_once(served)
            app = make_app(served, rules, origins=options.origins)
            # Texts of any length are answered within the time for draining, which is over when uvicorn shuts down.
            config = uvicorn.Config(
                app,
                http=http_protocol(),
                log_config=None,
                access_log=False,
                timeout_graceful_shutdown=_CLOSING_SECONDS,
            )
            host, port = listener.getsockname()[:2]
            url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
            _Server(config, served, options.drain, lambda: say(f"{served.name} is ready at {url}/v1")).run([listener])
        finally:
            served.service.close()
            if options.phrases.file is not None:
                bundle.phrases.save()
        if served.service.health == "unhealthy":
            raise ServiceUnhealthy("the engine failed twice in a row; the log has the causes")


def memory_text(served: Served) -> str:
    """What the caches take, in words."""
    options, manifest = served.service.options, served.bundle.manifest
    size = cache_bytes(manifest, options.rows, served.capacity)
    return (
        f"{options.rows} rows of {served.capacity} tokens: the caches take up to {size / 2**20:.0f} MiB "
        f"({cache_bytes(manifest, 1, served.capacity) / 2**20:.1f} MiB a row)"
    )


class _Server(uvicorn.Server):
    """Drains where uvicorn would stop."""

    def __init__(self, config: uvicorn.Config, served: Served, drain: float, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._served, self._drain_seconds, self._ready = served, drain, ready
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then say so."""
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
        self._ready()

    async def on_tick(self, counter: int) -> bool:
        """Whether to stop."""
        return await super().on_tick(counter) or self._served.service.health == "unhealthy"

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal came: the first one drains, the next one cancels."""
        if self._loop is None:
            self.should_exit = True
        else:
            self._loop.call_soon_threadsafe(self._stop)

    def _stop(self) -> None:
        if self._draining is None:
            _log.info("draining: running requests may end within %g s", self._drain_seconds)
            self._draining = asyncio.ensure_future(self._drain())
        else:
            self._drain_seconds = 0.0
            self._draining.cancel()

    async def _drain(self) -> None:
        service = self._served.service
        try:
            await asyncio.to_thread(service.drain, self._drain_seconds)
        except asyncio.CancelledError:
            _log.info("cancelling what still runs")
        await asyncio.to_thread(service.close)
        self.should_exit = True


def _bound(host: str, port: int) -> socket.socket:
    """A socket that has the address, but does not listen yet."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise UsageError(f"cannot listen at {host}:{port}: {error}; give another --port or --host") from error
    return listener


def _try_once(served: Served) -> None:
    """Run one prompt through the engine, so that what cannot run fails now, and nothing is loaded for the first user.

    Raises BackendError.
    """
    service = served.service
    request = service.request([0], max_new_tokens=min(2, served.capacity - 1), ignore_eos=True)
    try:
        service.submit(request).result(600)
    except TimeoutError as error:
        raise BackendError("the engine gave no token within ten minutes") from error
