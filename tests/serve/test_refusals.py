"""What is refused, with which status, body and headers; and what is logged and counted of it."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from dspark_runtime import Bundle, ServiceOptions
from dspark_runtime.errors import UsageError
from dspark_serve.access import AccessRules, ApiKeys, RateLimits
from dspark_serve.streams import StreamLimits
from tests.serve.gate import Gate
from tests.serve.running import NAME, Running, running

USER: Any = [{"role": "user", "content": "once upon a time"}]
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def refused(server: Running, path: str, body: Any, **headers: str) -> tuple[int, dict[str, Any]]:
    """Status and error of a request."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = httpx.post(server.url + path, content=data, headers={"Content-Type": "application/json", **headers})
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return answer.status_code, error


@pytest.mark.parametrize(
    ("field", "value", "param"),
    [
        ("temperature", -1, "temperature"),
        ("temperature", "warm", "temperature"),
        ("top_p", 0, "top_p"),
        ("top_p", None, None),
        ("n", 9, "n"),
        ("n", 0, "n"),
        ("max_tokens", 0, "max_tokens"),
        ("max_tokens", 3.5, "max_tokens"),
        ("stop", [""], "stop"),
        ("stop", ["a"] * 17, "stop"),
        ("logit_bias", {"x": 1}, "logit_bias"),
        ("logit_bias", {"5": 101}, "logit_bias"),
        ("logit_bias", {"384": 1}, "logit_bias"),
        ("top_k", 385, "top_k"),
        ("messages", [], "messages"),
        ("messages", [{"role": "user"}], "messages"),
        ("messages", [{"role": "king", "content": "x"}], "messages"),
        ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "messages"),
        ("functions", [], "functions"),
        ("reasoning_effort", "high", "reasoning_effort"),
        ("modalities", ["audio"], "modalities"),
        ("stream_options", {"include_usage": True}, "stream_options"),
        ("chat_template_kwargs", {"messages": []}, "chat_template_kwargs"),
        ("frobnicate", 1, "frobnicate"),
        ("model", "gpt-4", "model"),
    ],
)
def test_a_wrong_field_is_named(server: Running, field: str, value: Any, param: str | None) -> None:
    body = {"model": NAME, "messages": USER, "max_tokens": 1, field: value}
    if param is None:  # null is the same as nothing
        assert httpx.post(server.url + CHAT, json=body).status_code == 200
        return
    status, error = refused(server, CHAT, body)
    assert status == (404 if field == "model" else 400)
    assert error["type"] == "invalid_request_error"
    assert str(error["param"]).split(".")[0] == param
    assert field not in ("functions", "frobnicate") or field in error["message"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"model": NaN}',
        b'{"model": "\\ud800"}',
        b"[" * 100_000,
        b'{"max_tokens": ' + b"9" * 10_000 + b"}",
        b"\xff\xfe",
    ],
)
def test_a_body_that_is_not_what_it_should_be(server: Running, body: bytes) -> None:
    for path in (CHAT, COMPLETIONS, "/tokenize", "/detokenize"):
        status, error = refused(server, path, body)
        assert (status, error["type"]) == (400, "invalid_request_error")


def test_what_a_web_page_may_send_unasked_is_not_taken(server: Running) -> None:
    body = json.dumps({"model": NAME, "messages": USER, "max_tokens": 1})
    answer = httpx.post(server.url + CHAT, content=body, headers={"Content-Type": "text/plain"})
    assert answer.status_code == 400 and "application/json" in answer.json()["error"]["message"]


def test_too_many_tokens_names_both_numbers(server: Running, client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=r"max_new_tokens=250.*256") as caught:
        client.completions.create(model=NAME, prompt="once upon a time", max_tokens=250)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="256") as caught:
        client.chat.completions.create(model=NAME, messages=[{"role": "user", "content": "so " * 400}])
    assert caught.value.code == "context_length_exceeded"


def test_unknown_models_and_routes_and_methods(server: Running, client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-4")
    assert caught.value.code == "model_not_found" and caught.value.param == "model"
    assert refused(server, "/v2/nothing", {})[0] == 404
    answer = httpx.get(server.url + CHAT)
    assert answer.status_code == 405 and answer.json()["error"]["type"] == "invalid_request_error"


def test_harmless_fields_are_ignored_and_named(client: OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model=NAME, messages=USER, max_tokens=1, store=True, metadata={"a": "b"}, user="me", service_tier="auto"
    )
    assert raw.headers["x-dspark-ignored"] == "metadata, service_tier, store, user"


def test_request_ids_are_echoed_or_made(server: Running) -> None:
    def answered(**headers: str) -> str:
        return httpx.get(f"{server.url}/v1/models", headers=headers).headers["x-request-id"]

    assert answered(**{"x-request-id": "mine-1"}) == "mine-1"
    made = {answered(), answered(**{"x-request-id": "two words"}), answered(**{"x-request-id": "x" * 200})}
    assert len(made) == 3 and all(name.startswith("req-") for name in made)
    assert httpx.post(server.url + CHAT, json={}).headers["x-request-id"].startswith("req-")


def test_every_request_has_a_line_in_the_log(server: Running, client: OpenAI, caplog: Any) -> None:
    with caplog.at_level(logging.INFO, logger="dspark_serve.requests"):
        options: Any = {"max_tokens": 5, "n": 2, "extra_body": {"ignore_eos": True}}
        client.chat.completions.create(model=NAME, messages=USER, extra_headers={"x-request-id": "the-one"}, **options)
        refused(server, CHAT, {}, **{"x-request-id": "the-other"})
    lines = {line["id"]: line for line in map(json.loads, (r.message for r in caplog.records))}
    good, bad = lines["the-one"], lines["the-other"]
    assert (good["status"], good["path"], good["tokens"], good["choices"]) == (200, CHAT, 10, 2)
    assert good["finish_reasons"] == ["length"] and good["seconds"] >= good["first_token_seconds"]
    assert (bad["status"], bad["reason"]) == (400, "refused") and "tokens" not in bad


@pytest.fixture(scope="module")
def guarded(opened: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server with keys, limits and origins."""
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text("# ours\nsecret-1 alice\n\nsecret-2\n")
    keys = ApiKeys.read(file, {"DSPARK_API_KEY": "secret-3"})
    rules = AccessRules(keys, RateLimits(3, clock=lambda: 0.0), most_body_bytes=1000, body_seconds=0.2)
    with running(opened, rules=rules, origins=["https://page.example"]) as it:
        yield it


def test_keys(guarded: Running, caplog: Any) -> None:
    for key in ("secret-1", "secret-2", "secret-3"):
        assert guarded.client(key).models.list().data
    for key in ("secret", "secret-1 ", "alice", "é"):
        assert (
            httpx.get(f"{guarded.url}/v1/models", headers={"Authorization": f"Bearer {key}x".encode()}).status_code
            == 401
        )
    with pytest.raises(openai.AuthenticationError) as caught:
        guarded.client("wrong").models.list()
    assert caught.value.code == "invalid_api_key"
    answer = httpx.get(f"{guarded.url}/v1/models")
    assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
    for path in ("/health", "/health/ready", "/health/live", "/metrics"):
        assert httpx.get(guarded.url + path).status_code == 200
    with caplog.at_level(logging.INFO, logger="dspark_serve.requests"):
        guarded.client("secret-1").models.list()
    assert [json.loads(record.message)["key"] for record in caplog.records] == ["alice"]


def test_rates_are_by_key(guarded: Running) -> None:
    def ask(key: str) -> httpx.Response:
        return httpx.post(f"{guarded.url}/tokenize", json={"prompt": "x"}, headers={"Authorization": f"Bearer {key}"})

    assert [ask("secret-2").status_code for _ in range(4)] == [200, 200, 200, 429]
    late = ask("secret-2")
    assert late.headers["retry-after"] == "20" and late.json()["error"]["code"] == "rate_limit_exceeded"
    assert ask("secret-3").status_code == 200
    assert guarded.client("secret-2").models.list().data  # looking costs nothing


def test_a_bucket_fills_again() -> None:
    now = [0.0]
    limits = RateLimits(2, clock=lambda: now[0])
    assert [limits.take("a") for _ in range(3)] == [0, 0, 30]
    now[0] = 29
    assert limits.take("a") == pytest.approx(1)
    now[0] = 30.5
    assert limits.take("a") == 0 and limits.take("b") == 0
    assert all(RateLimits(0).take("a") == 0 for _ in range(100))


def test_large_bodies(guarded: Running) -> None:
    headers = {"Authorization": "Bearer secret-3", "Content-Type": "application/json"}
    body = json.dumps({"model": NAME, "prompt": "x" * 2000}).encode()
    whole = httpx.post(guarded.url + COMPLETIONS, content=body, headers=headers)
    parts = httpx.post(guarded.url + COMPLETIONS, content=iter([body[:600], body[600:]]), headers=headers)
    for answer in (whole, parts):
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")


def test_only_named_pages_may_read(guarded: Running) -> None:
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization, content-type"}
    for origin, allowed in (("https://page.example", "https://page.example"), ("https://other.example", None)):
        answer = httpx.options(guarded.url + CHAT, headers={"Origin": origin, **asks})
        assert answer.headers.get("access-control-allow-origin") == allowed


def test_only_local_names_where_the_rules_say_so(opened: Bundle) -> None:
    from dspark_serve.access import LOCAL_HOSTS

    with running(opened, rules=AccessRules(hosts=LOCAL_HOSTS)) as server:
        for host, status in (("localhost", 200), ("127.0.0.1:1", 200), ("[::1]:80", 200), ("rebound.example", 403)):
            assert httpx.get(f"{server.url}/v1/models", headers={"Host": host}).status_code == status


@pytest.mark.parametrize("text", ["", "# none\n\n"])
def test_a_file_without_keys_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "keys").write_text(text)
    with pytest.raises(UsageError, match="no API key"):
        ApiKeys.read(tmp_path / "keys", {})
    with pytest.raises(UsageError, match="cannot be read"):
        ApiKeys.read(tmp_path / "none", {})


def test_a_full_queue_a_deadline_and_a_drain(opened: Bundle) -> None:
    gate = Gate()
    with running(
        opened, ServiceOptions(rows=1, queue=1, capacity=256), gate, limits=StreamLimits(patience=0.1)
    ) as server:
        client = server.client()
        body: Any = {"model": NAME, "messages": USER, "max_tokens": 20, "stream": True}
        first = client.chat.completions.create(**body, extra_body={"ignore_eos": True})
        next(iter(first))
        with httpx.stream("POST", f"{server.url}{CHAT}", json={**body, "priority": 3}, timeout=60) as second:
            assert second.status_code == 200  # it waits
            assert httpx.get(f"{server.url}/health/ready").json() == {"status": "full"}
            with pytest.raises(openai.RateLimitError) as full:
                client.chat.completions.create(**body)
            assert full.value.code == "overloaded" and full.value.response.headers["retry-after"] == "1"
            gate.open()
            assert second.read().endswith(b"data: [DONE]\n\n")
        assert server.idle()
        text = httpx.get(f"{server.url}/metrics").text
        assert 'dspark_refused_total{reason="overloaded"} 1.0' in text
        assert f'dspark_requests_total{{reason="refused",route="{CHAT}",status="429"}} 1.0' in text
        server.service.drain(10)
        assert httpx.get(f"{server.url}/health/ready").json() == {"status": "draining"}
        assert httpx.get(f"{server.url}/health/live").status_code == 200
        with pytest.raises(openai.InternalServerError) as stopped:
            client.chat.completions.create(**body)
        assert stopped.value.status_code == 503 and stopped.value.code == "unavailable"


def test_a_deadline_ends_a_text_and_a_wait(opened: Bundle) -> None:
    gate = Gate()
    with running(
        opened, ServiceOptions(rows=1, queue=4, capacity=256), gate, limits=StreamLimits(patience=0.1)
    ) as server:
        body: Any = {"model": NAME, "messages": USER, "max_tokens": 100, "ignore_eos": True}
        with httpx.stream("POST", server.url + CHAT, json=body | {"stream": True, "timeout": 0.3}, timeout=60) as late:
            assert late.status_code == 200  # it runs, and its engine waits
            with ThreadPoolExecutor() as pool:
                waiting = pool.submit(httpx.post, server.url + CHAT, json=body | {"timeout": 0.3}, timeout=60)
                while not server.service.stats().waiting:
                    time.sleep(0.01)
                time.sleep(0.3)
                gate.open()
                text = late.read().decode()
                assert waiting.result().status_code == 504
                assert waiting.result().json()["error"]["code"] == "deadline_exceeded"
        assert '"code":"deadline_exceeded"' in text and "[DONE]" not in text
        assert server.idle()
