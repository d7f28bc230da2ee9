"""A Ray Serve application with OpenAI's API: ``./start.sh``. ``settings.json`` says what it serves, and how.

``Front`` reads requests and gives them to one of the ``Model`` replicas, each of which is a whole copy of the model.
"""

import json
import os
import random
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "python"))

from ray import serve  # noqa: E402
from ray.exceptions import RayActorError  # noqa: E402
from ray.serve.config import RequestRouterConfig  # noqa: E402
from ray.serve.request_router import RequestRouter  # noqa: E402
from starlette.requests import Request  # noqa: E402
from starlette.responses import Response, StreamingResponse  # noqa: E402

from dspark_runtime import ServiceOptions  # noqa: E402
from dspark_serve.access import MOST_BODY_BYTES  # noqa: E402
from dspark_serve.errors import ApiError  # noqa: E402
from dspark_serve.replica import Replica, plain_scope, prefix_of, ranked  # noqa: E402

SETTINGS = json.loads((HERE / "settings.json").read_text(encoding="utf-8"))
OPTIONS = ServiceOptions(**SETTINGS["service"])
MOST_REQUESTS = OPTIONS.rows + OPTIONS.queue + 16  # the last ones are refused by the service, or ask for its health
ATTEMPTS = 3


class PrefixRouter(RequestRouter):  # type: ignore[misc]
    """Prefers the replica that has seen how the prompt begins, while it takes requests."""

    async def choose_replicas(self, candidate_replicas: list[Any], pending_request: Any = None) -> list[list[Any]]:
        """Ranks of replicas; those of the first are asked first."""
        prefix = prefix_of(pending_request.args[1]) if pending_request and len(pending_request.args) > 1 else ""
        if not prefix:
            return [[replica] for replica in random.sample(candidate_replicas, len(candidate_replicas))]
        order = ranked(prefix, [replica.replica_id.unique_id for replica in candidate_replicas])
        return [[candidate_replicas[place]] for place in order]


class Model(Replica):
    """One copy of the model."""

    def __init__(self) -> None:
        super().__init__(HERE / SETTINGS["bundle"], SETTINGS["name"], OPTIONS, SETTINGS["drain"], **SETTINGS["opening"])

    def __del__(self) -> None:
        self.close()


class Front:
    """Takes HTTP requests; ``model`` is a handle of the replicas."""

    def __init__(self, model: Any) -> None:
        self._model = model.options(method_name="answer", stream=True)

    async def __call__(self, request: Request) -> Response:
        """Pass on what a replica answers; if it dies before it answers, another one does."""
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > MOST_BODY_BYTES:
                message = f"the body has more than {MOST_BODY_BYTES} bytes"
                return ApiError(413, message, code="request_too_large").response()
        for _ in range(ATTEMPTS):
            messages = self._model.remote(plain_scope(request.scope), bytes(body))
            try:
                head = await messages.__anext__()
            except RayActorError:
                continue
            response = StreamingResponse(_bodies(messages), head["status"])
            response.raw_headers = list(head["headers"])
            return response
        return ApiError(503, "no replica answers", code="unavailable", retry_after=5).response()


async def _bodies(messages: Any) -> AsyncIterator[bytes]:
    async for message in messages:
        yield message.get("body", b"")


def application() -> Any:
    """What Ray Serve runs."""
    replicas = serve.deployment(
        num_replicas=SETTINGS["replicas"],
        max_ongoing_requests=MOST_REQUESTS,
        ray_actor_options=SETTINGS["actor"],
        health_check_period_s=5,
        graceful_shutdown_timeout_s=SETTINGS["drain"] + 15,
        request_router_config=RequestRouterConfig(request_router_class=PrefixRouter),
    )(Model)
    front = serve.deployment(max_ongoing_requests=10_000, ray_actor_options={"num_cpus": 0})(Front)
    return front.bind(replicas.bind())


if __name__ == "__main__":
    serve.start(
        http_options={
            "host": os.environ.get("DSPARK_ADDRESS", "127.0.0.1"),
            "port": int(os.environ.get("DSPARK_HTTP_PORT", "8000")),
        }
    )
    serve.run(application(), name=SETTINGS["name"], blocking=True)
