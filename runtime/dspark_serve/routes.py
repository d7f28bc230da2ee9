"""What all routes share: how bodies are read, how errors are described, and where the served model is found."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request
from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from dspark_serve.errors import CLIENT_GONE, ApiError
from dspark_serve.schemas import ErrorBody
from dspark_serve.serving import Served

ANSWERS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "The request is wrong, or comes too early."},
    "5XX": {"model": ErrorBody, "description": "The server could not answer."},
}


STREAMED: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {}}, "description": "The whole answer, or a stream of its chunks."}
}


class _StrictRequest(Request):
    async def body(self) -> bytes:
        """The whole body."""
        try:
            return await super().body()
        except ClientDisconnect:
            raise ApiError(CLIENT_GONE, "the client went away") from None

    async def json(self) -> Any:
        """The body, which must be JSON: no NaN, no half characters, no bottomless nesting."""
        try:
            return from_json(await self.body(), allow_inf_nan=False)
        except ValueError as error:
            raise ApiError(400, f"the body is not valid JSON: {error}") from error


class StrictRoute(APIRoute):
    """Reads JSON strictly."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """What answers a request."""
        answer = super().get_route_handler()

        async def strictly(request: Request) -> Response:
            return await answer(_StrictRequest(request.scope, request.receive))

        return strictly


def served_by(request: Request) -> Served:
    """What the app that ``request`` came to serves."""
    served: Served = request.app.state.served
    return served
