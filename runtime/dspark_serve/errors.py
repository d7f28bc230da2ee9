"""Errors of the HTTP interface, with bodies in OpenAI's form.

| status | ``type`` | ``code`` | when |
|---|---|---|---|
| 400 | invalid_request_error | | a field is malformed, unknown or cannot be honoured; ``param`` names it |
| 400 | invalid_request_error | context_length_exceeded | prompt and text are longer than the server allows |
| 401 | authentication_error | invalid_api_key | no API key, or an unknown one |
| 403 | invalid_request_error | | the server was called by another name than a local one |
| 404 | invalid_request_error | model_not_found | another model than the one that is served |
| 404, 405 | invalid_request_error | | no such route or method |
| 408 | invalid_request_error | request_timeout | the body did not arrive in time |
| 413 | invalid_request_error | request_too_large | the body is too long |
| 429 | rate_limit_error | overloaded | the queue is full; ``Retry-After`` |
| 429 | rate_limit_error | rate_limit_exceeded | this key asks too often; ``Retry-After`` |
| 431 | invalid_request_error | headers_too_large | the headers are too long |
| 500 | server_error | | a pass of the model failed |
| 503 | server_error | unavailable | the server drains or its engine has failed; ``Retry-After`` |
| 504 | server_error | deadline_exceeded | the request's own ``timeout`` has passed |
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from dspark_runtime.errors import (
    CapacityError,
    ChatTemplateError,
    DeadlineExceeded,
    DsparkError,
    Overloaded,
    ServiceStopped,
    ServiceUnhealthy,
    UsageError,
)

RETRY_SECONDS = 1
CLIENT_GONE = 499
"""The status in logs and metrics of a request whose client went away; nobody is sent it."""

_NAMED = re.compile(r"(\w+)")


class ApiError(HTTPException):
    """An answer other than 200.

    Args:
        status: of HTTP.
        message: what was asked, what exists, what to do.
        code: one of the module's table.
        param: the field of the request that is wrong.
        retry_after: seconds after which asking again makes sense.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        all_headers = dict(headers or {})
        if retry_after is not None:
            all_headers["Retry-After"] = str(retry_after)
        super().__init__(status, message, all_headers or None)
        self.code, self.param = code, param

    def body(self) -> dict[str, Any]:
        """The error as OpenAI's clients read it."""
        return error_body(self.status_code, str(self.detail), self.code, self.param)

    def response(self) -> JSONResponse:
        """The whole answer."""
        return JSONResponse(self.body(), self.status_code, self.headers)


def error_body(status: int, message: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """``{"error": {...}}``."""
    return {"error": {"message": message, "type": _type_of(status), "param": param, "code": code}}


def from_runtime(error: DsparkError, fields: Collection[str] = (), default_param: str | None = None) -> ApiError:
    """What an error of the runtime is to a client.

    ``fields``: names the request has; a message that begins with one blames that field. ``default_param``: the
    field to blame otherwise.
    """
    message = str(error)
    if isinstance(error, CapacityError):
        return ApiError(400, message, code="context_length_exceeded", param=default_param)
    if isinstance(error, ChatTemplateError):
        return ApiError(400, message, param="messages")
    if isinstance(error, UsageError):
        named = _NAMED.match(message)
        param = named[1] if named and named[1] in fields else default_param
        return ApiError(400, message, param=param)
    if isinstance(error, Overloaded):
        return ApiError(429, message, code="overloaded", retry_after=RETRY_SECONDS)
    if isinstance(error, ServiceStopped | ServiceUnhealthy):
        return ApiError(503, message, code="unavailable", retry_after=RETRY_SECONDS)
    if isinstance(error, DeadlineExceeded):
        return ApiError(504, message, code="deadline_exceeded")
    return ApiError(500, message)


def from_validation(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """The first of pydantic's errors about a request's body."""
    first = next((error for error in errors if error["type"] == "extra_forbidden"), errors[0])
    place = [str(part) for part in first["loc"] if part != "body"]
    param = ".".join(place) or None
    kind, message = first["type"], str(first["msg"])
    if not place:
        message = "the body must be a JSON object, and its Content-Type application/json"
    elif kind == "extra_forbidden":
        names = [".".join(str(p) for p in e["loc"] if p != "body") for e in errors if e["type"] == "extra_forbidden"]
        message = f"unknown field{'s' * (len(names) > 1)}: {', '.join(names[:10])}"
    elif kind == "missing":
        message = f"{param or 'the body'} is missing"
    elif kind in ("none_required", "literal_error") and param:
        message = f"{param} has a value this server cannot honour: {message[:1].lower()}{message[1:]}"
    elif param:
        message = f"{param}: {message[:1].lower()}{message[1:]}"
    return ApiError(400, message.replace("value error, ", ""), param=param)


def _type_of(status: int) -> str:
    if status == 401:
        return "authentication_error"
    if status == 429:
        return "rate_limit_error"
    return "server_error" if status >= 500 else "invalid_request_error"
