"""Every request's id, its line in the log and its count in the metrics; and the answer to what nobody expected."""

from __future__ import annotations

import json
import logging
import re
import secrets
import time
from collections.abc import Callable
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dspark_runtime.serving.events import Failed
from dspark_runtime.serving.handle import Handle
from dspark_serve.errors import CLIENT_GONE, ApiError, from_runtime
from dspark_serve.streams import Channel

log = logging.getLogger("dspark_serve.requests")
_faults = logging.getLogger("dspark_serve")

_IDENTITY = re.compile(r"[\w.:/+=@-]{1,128}", re.ASCII)
_QUIET = ("/health", "/metrics")  # asked for every few seconds
Answered = Callable[[str, int, str], None]


class Journal:
    """ASGI middleware; ``answered(route, status, reason)`` is told of every request."""

    def __init__(self, app: ASGIApp, answered: Answered) -> None:
        self._app, self._answered = app, answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer and take note."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        identity = given if _IDENTITY.fullmatch(given) else f"req-{secrets.token_hex(12)}"
        began, entry = time.monotonic(), _Entry(scope, identity)

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                entry.status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = identity
            await send(message)
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                entry.complete = True

        try:
            await self._app(scope, receive, noted)
        except Exception:
            _faults.exception("request %s failed unexpectedly", identity)
            if not entry.status:
                error = ApiError(500, f"an unexpected error, which is a fault of the server; its log has {identity}")
                await error.response()(scope, receive, noted)
        finally:
            status, reason = entry.outcome()
            self._answered(entry.route, status, reason)
            if not scope["path"].startswith(_QUIET):
                log.info("%s", json.dumps(entry.line(status, reason, time.monotonic() - began)))


class _Entry:
    """What is known of one request."""

    def __init__(self, scope: Scope, identity: str) -> None:
        self._scope, self._identity = scope, identity
        self._state: dict[str, Any] = scope.setdefault("state", {})
        self.status = 0
        self.complete = False

    @property
    def channel(self) -> Channel | None:
        """Its requests to the service, if it had any."""
        found: Channel | None = self._state.get("channel")
        return found

    @property
    def route(self) -> str:
        """The path of the route that answered: one of few."""
        return getattr(self._scope.get("route"), "path", "none")

    def outcome(self) -> tuple[int, str]:
        """Status and reason, as logs and metrics have them: 499 where the client did not wait for the end."""
        channel = self.channel
        if channel is not None and channel.slow:
            return CLIENT_GONE, "slow_client"
        if not self.complete or self.status == CLIENT_GONE:
            return CLIENT_GONE, "client_gone"
        if self.status >= 400:
            return self.status, "refused" if self.status < 500 else "failed"
        if channel is not None:
            errors = [h.outcome.error for h in channel.handles if isinstance(h.outcome, Failed)]
            if errors:  # behind the first byte
                error = from_runtime(errors[0])
                return error.status_code, error.code or "failed"
        return self.status, "ok"

    def line(self, status: int, reason: str, seconds: float) -> dict[str, Any]:
        """The line of the log."""
        scope, channel = self._scope, self.channel
        entry = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "id": self._identity,
            "method": scope["method"],
            "path": scope["path"][:200],
            "status": status,
            "reason": reason,
            "seconds": round(seconds, 4),
            "client": (scope.get("client") or ("unknown", 0))[0],
        }
        if key := self._state.get("key"):
            entry["key"] = key
        return entry | (_counts(channel.handles) if channel is not None and channel.handles else {})


def _counts(handles: list[Handle]) -> dict[str, Any]:
    """Tokens and times of the service's requests behind one request of a client."""
    ended = [h.outcome.generation for h in handles if h.outcome is not None and h.outcome.generation is not None]
    first = handles[0]
    counts: dict[str, Any] = {
        "choices": len(handles),
        "prompt_tokens": sum(len(handle.request.prompt) for handle in handles),
        "cached_tokens": sum(generation.cached_tokens for generation in ended),
        "tokens": sum(handle.sequence.emitted for handle in handles if handle.sequence is not None),
    }
    if ended:
        rounds = sum(generation.stats.rounds for generation in ended)
        made = sum(generation.stats.emitted for generation in ended) - len(ended)
        counts["accepted_length"] = round(made / rounds, 3) if rounds else 0.0
        counts["finish_reasons"] = sorted({generation.finish_reason for generation in ended})
    if first.admitted:
        counts["queue_seconds"] = round(first.admitted - first.submitted, 4)
    if first.first_token:
        counts["first_token_seconds"] = round(first.first_token - first.submitted, 4)
    return counts
