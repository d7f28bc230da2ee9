"""``GET /v1/models``, the state of the server, and its metrics."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import JSONResponse, PlainTextResponse, Response

from dspark_serve.routes import ANSWERS, served_by
from dspark_serve.schemas import HealthAnswer, ModelCard, ModelList
from dspark_serve.serving import Served

router = APIRouter(responses=ANSWERS)
health_router = APIRouter(responses={"5XX": {"model": HealthAnswer}})

DEAD_SECONDS = 30.0
"""The engine's thread is taken for dead once it has shown no life for this long."""


@router.get("/v1/models", response_model=ModelList)
async def models(request: Request) -> dict[str, Any]:
    """List what is served."""
    return {"object": "list", "data": [_card(served_by(request))]}


@router.get("/v1/models/{name:path}", response_model=ModelCard)
async def model(name: str, request: Request) -> dict[str, Any]:
    """Describe one model."""
    served = served_by(request)
    served.check_model(name)
    return _card(served)


def _card(served: Served) -> dict[str, Any]:
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "dspark-export",
        "max_model_len": served.capacity,
    }


@health_router.get("/health", response_model=HealthAnswer)
async def health(request: Request) -> Response:
    """Say what the service does; 503 unless it takes requests."""
    served = served_by(request)
    status = _readiness(served)
    stats = served.service.stats().to_dict() | {"status": status}
    return JSONResponse(stats, 200 if status == "ready" else 503)


@health_router.get("/health/ready", response_model=HealthAnswer)
async def ready(request: Request) -> Response:
    """200 while the server takes requests."""
    status = _readiness(served_by(request))
    return JSONResponse({"status": status}, 200 if status == "ready" else 503)


@health_router.get("/health/live", response_model=HealthAnswer)
async def live(request: Request) -> Response:
    """200 while the engine's thread lives; restart the process otherwise."""
    service = served_by(request).service
    dead = service.health in ("unhealthy", "stopped") or service.heartbeat > DEAD_SECONDS
    return JSONResponse({"status": "dead" if dead else "live"}, 503 if dead else 200)


@health_router.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """Figures for Prometheus."""
    return Response(served_by(request).metrics.text(), media_type=CONTENT_TYPE_LATEST)


def _readiness(served: Served) -> str:
    service = served.service
    if service.health != "ready":
        return service.health
    return "full" if service.stats().waiting >= service.options.queue > 0 else "ready"
