"""One of several copies of a served model; a front end passes it whole HTTP requests.

The front end reads a request's body, chooses a copy by :func:`ranked`, so that prompts with the same beginning go to
the copy that has it in its cache, and forwards what :meth:`Replica.answer` yields. Nothing here knows Ray.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from starlette.types import Message, Scope

from dspark_runtime import Bundle, ServiceOptions
from dspark_runtime.errors import ServiceUnhealthy
from dspark_serve.access import AccessRules, ApiKeys
from dspark_serve.app import make_app
from dspark_serve.serving import Served

DEAD_SECONDS = 30.0
_PREFIX_CHARACTERS = 256
_PLAIN = ("type", "http_version", "method", "scheme", "path", "raw_path", "query_string", "headers", "client", "server")


class Replica:
    """A bundle behind OpenAI's API, without a socket.

    Args:
        bundle: its folder.
        name: of the model in requests.
        service: sizes and rules.
        drain: seconds that running requests have to end in :meth:`close`.
        opening: arguments of :meth:`Bundle.open`.

    Raises:
        DsparkError: the bundle cannot be opened or served.
    """

    def __init__(
        self, bundle: Path, name: str, service: ServiceOptions | None = None, drain: float = 30.0, **opening: Any
    ) -> None:
        options = service or ServiceOptions()
        opened = Bundle.open(bundle, capacity=options.capacity, **opening)
        self._served = Served.start(opened, options, name)
        self._drain = drain
        self._app = make_app(self._served, AccessRules(ApiKeys.read(None)))
        self._running = AsyncExitStack()
        self._started = asyncio.Lock()
        self._ready = False

    async def answer(self, scope: Scope, body: bytes) -> AsyncIterator[Message]:
        """The ASGI messages that answer a request; closing the iterator cancels it."""
        await self._start()
        messages: asyncio.Queue[Message | None] = asyncio.Queue()
        waiting = [{"type": "http.request", "body": body, "more_body": False}]
        gone = asyncio.Event()

        async def receive() -> Message:
            if waiting:
                return waiting.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        task = asyncio.ensure_future(self._app(dict(scope), receive, messages.put))
        task.add_done_callback(lambda _: messages.put_nowait(None))
        try:
            while (message := await messages.get()) is not None:
                yield message
            task.result()
        finally:
            gone.set()

    def check_health(self) -> None:
        """ServiceUnhealthy if the engine has failed or shows no life."""
        service = self._served.service
        if service.health in ("unhealthy", "stopped") or service.heartbeat > DEAD_SECONDS:
            raise ServiceUnhealthy(f"the service is {service.health}; its last sign is {service.heartbeat:.0f} s old")

    def close(self) -> None:
        """Let running requests end for a while, then stop."""
        self._served.service.close(self._drain)

    async def _start(self) -> None:
        """On the event loop that answers, of which there is none when the object is made."""
        async with self._started:
            if not self._ready:
                await self._running.enter_async_context(self._app.router.lifespan_context(self._app))
                self._ready = True


def plain_scope(scope: Scope) -> Scope:
    """What a scope says of the request, without what belongs to the server that made it."""
    return {name: scope[name] for name in _PLAIN if name in scope}


def prefix_of(body: bytes) -> str:
    """How the prompt in a request's body begins; empty if there is none."""
    try:
        found = json.loads(body)
    except ValueError:
        return ""
    if not isinstance(found, dict):
        return ""
    prompt = found.get("messages") or found.get("prompt") or ""
    return (prompt if isinstance(prompt, str) else json.dumps(prompt))[:_PREFIX_CHARACTERS]


def ranked(prefix: str, replicas: Sequence[str]) -> list[int]:
    """Places of ``replicas``, that for ``prefix`` first; most prefixes keep theirs when a replica comes or goes.

    Every replica draws a number from its name and the prefix, and the highest wins (rendezvous hashing, Thaler and
    Ravishankar 1998).
    """
    drawn = [hashlib.sha256(f"{name}\0{prefix}".encode()).digest() for name in replicas]
    return sorted(range(len(replicas)), key=drawn.__getitem__, reverse=True)
