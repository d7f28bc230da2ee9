"""The ASGI application over one service."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from dspark_runtime.errors import DsparkError
from dspark_serve import chat, completions, models, page, tokenize
from dspark_serve.access import Access, AccessRules
from dspark_serve.errors import ApiError, from_runtime, from_validation
from dspark_serve.journal import Journal
from dspark_serve.serving import Served
from dspark_serve.streams import StreamLimits


def make_app(
    served: Served,
    rules: AccessRules | None = None,
    *,
    origins: Sequence[str] = (),
    limits: StreamLimits | None = None,
) -> FastAPI:
    """An application that serves one model; it does not close the service.

    Args:
        served: the model.
        rules: who may ask; None for everybody.
        origins: of web pages whose scripts may ask (CORS).
        limits: of streams.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        served.connect(limits or StreamLimits())
        vocabulary = asyncio.create_task(served.grammars.vocabulary())  # so that the first grammar need not wait
        yield
        vocabulary.cancel()

    app = FastAPI(title="dspark-serve", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.served = served
    for router in (chat.router, completions.router, models.router, tokenize.router, models.health_router, page.router):
        app.include_router(router)
    app.add_middleware(Access, rules=rules or AccessRules())
    if origins:
        exposed = ["x-request-id", "x-dspark-ignored", "x-dspark-speculation", "x-dspark-guide", "retry-after"]
        app.add_middleware(
            CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"], expose_headers=exposed
        )
    app.add_middleware(Journal, answered=served.metrics.answered)  # around all others
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(DsparkError, _runtime_error)
    return app


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if not isinstance(error, ApiError):
        error = ApiError(error.status_code, str(error.detail), headers=error.headers)
    return error.response()


async def _invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return from_validation(error.errors()).response()


async def _runtime_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, DsparkError)
    return from_runtime(error).response()
