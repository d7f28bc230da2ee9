"""Who may ask, how often, and how much at once: API keys, hosts, rates, and bounds on request bodies."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import math
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dspark_runtime.errors import UsageError
from dspark_serve.errors import ApiError

KEY_VARIABLE = "DSPARK_API_KEY"
MOST_BODY_BYTES = 8 * 2**20
BODY_SECONDS = 60.0
LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1", "[::1]"})

_OPEN = ("/health", "/metrics", "/page")  # and what is below them
_MOST_CALLERS = 10_000


class ApiKeys:
    """Keys by their digests, with a name for logs. Empty: everybody may ask.

    Args:
        keys: names by key.
    """

    def __init__(self, keys: Mapping[str, str] | None = None) -> None:
        self._names = {_digest(key): name for key, name in (keys or {}).items()}

    @classmethod
    def read(cls, file: Path | None, environment: Mapping[str, str] = os.environ) -> ApiKeys:
        """Keys of a file, one a line with an optional name behind a blank, and of ``DSPARK_API_KEY``.

        Raises:
            UsageError: the file cannot be read, or has no key.
        """
        keys: dict[str, str] = {}
        if file is not None:
            try:
                lines = file.read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise UsageError(f"the file of API keys cannot be read: {error}") from error
            words = [line.split(maxsplit=1) for line in lines if line.strip() and not line.startswith("#")]
            keys = {word[0]: word[1].strip() if len(word) > 1 else _short(word[0]) for word in words}
            if not keys:
                raise UsageError(f"{file} has no API key; write one a line, with a name behind a blank if you like")
        if one := environment.get(KEY_VARIABLE, "").strip():
            keys.setdefault(one, _short(one))
        return cls(keys)

    def __bool__(self) -> bool:
        return bool(self._names)

    def name_of(self, key: str) -> str | None:
        """The name of a key, None for an unknown one; takes as long for either."""
        given, found = _digest(key), None
        for digest, name in self._names.items():
            if hmac.compare_digest(digest, given):
                found = name
        return found


class RateLimits:
    """A bucket of tokens for each caller: ``per_minute`` requests at once, refilled evenly; 0 for no limit."""

    def __init__(self, per_minute: int = 0, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_minute, self._clock = per_minute, clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # what is left, and since when

    def take(self, caller: str) -> float:
        """Count one request; 0 if it may run, else the seconds to wait."""
        if not self._per_minute:
            return 0.0
        now, most = self._clock(), float(self._per_minute)
        left, since = self._buckets.pop(caller, (most, now))
        left = min(most, left + (now - since) * most / 60)
        allowed = left >= 1
        self._buckets[caller] = (left - allowed, now)
        if len(self._buckets) > _MOST_CALLERS:
            self._buckets.popitem(last=False)
        return 0.0 if allowed else (1 - left) * 60 / most


@dataclass(frozen=True)
class AccessRules:
    """Who may ask.

    Args:
        keys: of the callers.
        rates: requests that may make the model work, by key, or by address where there are no keys.
        hosts: names the server may be called by; None for any. On a loopback address without keys, it keeps the pages
            of other sites, which a browser shows, from asking under a name of theirs (DNS rebinding).
        most_body_bytes: of a request.
        body_seconds: in which a body must have arrived.
    """

    keys: ApiKeys = field(default_factory=ApiKeys)
    rates: RateLimits = field(default_factory=RateLimits)
    hosts: frozenset[str] | None = None
    most_body_bytes: int = MOST_BODY_BYTES
    body_seconds: float = BODY_SECONDS


class Access:
    """ASGI middleware that keeps :class:`AccessRules`."""

    def __init__(self, app: ASGIApp, rules: AccessRules) -> None:
        self._app, self._rules = app, rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or refuse."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            self._check(scope)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        await self._app(scope, self._bounded(receive), send)

    def _check(self, scope: Scope) -> None:
        rules, headers = self._rules, Headers(scope=scope)
        if rules.hosts is not None and _host(headers.get("host", "")) not in rules.hosts:
            raise ApiError(403, f"this server answers to {', '.join(sorted(rules.hosts))} only")
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > rules.most_body_bytes:
            raise self._too_large()
        path: str = scope["path"]
        if path == "/" or any(path == name or path.startswith(name + "/") for name in _OPEN):
            return
        caller = (scope.get("client") or ("unknown", 0))[0]
        if rules.keys:
            name = rules.keys.name_of(_bearer(headers.get("authorization", "")))
            if name is None:
                message = "give an API key of this server: Authorization: Bearer KEY"
                raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
            caller = scope.setdefault("state", {})["key"] = name
        if scope["method"] == "POST" and (seconds := rules.rates.take(caller)):
            wait = math.ceil(seconds)
            message = f"too many requests of {caller}; try again in {wait} s"
            raise ApiError(429, message, code="rate_limit_exceeded", retry_after=wait)

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is longer than {self._rules.most_body_bytes} bytes", code="request_too_large")

    def _bounded(self, receive: Receive) -> Receive:
        """``receive`` with a bound on the size of the body and on the time it takes."""
        deadline = time.monotonic() + self._rules.body_seconds
        size, complete = 0, False

        async def bounded() -> Message:
            nonlocal size, complete
            if complete:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(deadline - time.monotonic(), 0))
            except TimeoutError:
                raise ApiError(408, "the body did not arrive in time", code="request_timeout") from None
            size += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if size > self._rules.most_body_bytes:
                raise self._too_large()
            return message

        return bounded


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _short(key: str) -> str:
    return f"key-{_digest(key).hex()[:8]}"


def _bearer(value: str) -> str:
    scheme, _, key = value.partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


def _host(value: str) -> str:
    """The name in a Host header, without the port."""
    return value[: value.index("]") + 1] if value.startswith("[") and "]" in value else value.partition(":")[0].lower()
