"""The server against its own description: schemathesis asks what ``/openapi.json`` allows, and more."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.serve.running import NAME, Running

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
ROUTES = [
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{name}"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/health"),
    ("GET", "/health/live"),
    ("GET", "/health/ready"),
    ("GET", "/metrics"),
]
FEW, MANY = 15, 500


@pytest.fixture(scope="module")
def described(server: Running) -> Any:
    """What the server says of itself."""
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


def ask_much(server: Running, described: Any, method: str, path: str, cases: int, same: bool) -> None:
    """Ask a route ``cases`` times what its description allows, and, where it has a body, as often what it does not."""
    for mode in GenerationMode if method == "POST" else (GenerationMode.POSITIVE,):

        @given(case=described[path][method].as_strategy(generation_mode=mode))
        @settings(
            max_examples=cases, deadline=None, suppress_health_check=list(HealthCheck), derandomize=same, database=None
        )
        def ask(case: Any) -> None:
            body = case.body
            if isinstance(body, dict) and isinstance(body.get("model"), str):  # the one there is, and short texts
                body["model"] = NAME
                if isinstance(body.get("timeout"), int | float) and 0 < body["timeout"] < 60:
                    body["timeout"] += 60  # 504 is what a short one has to give
                for name in ("max_tokens", "max_completion_tokens"):
                    if isinstance(body.get(name), int) and body[name] > 0:
                        body[name] = 1 + body[name] % 8
            case.call_and_validate(base_url=server.url, checks=CHECKS, timeout=60)

        ask()
    assert server.idle()


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_a_few_requests(server: Running, described: Any, method: str, path: str) -> None:
    ask_much(server, described, method, path, FEW, same=True)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_many_requests(server: Running, described: Any, method: str, path: str) -> None:
    ask_much(server, described, method, path, MANY, same=False)


def test_every_route_is_asked_and_describes_its_refusals(server: Running) -> None:
    paths = httpx.get(f"{server.url}/openapi.json").json()["paths"]
    assert {(method.upper(), path) for path, methods in paths.items() for method in methods} == set(ROUTES)
    assert not [path for path, methods in paths.items() for o in methods.values() if "422" in o["responses"]]
