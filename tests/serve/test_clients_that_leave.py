"""Clients that go away, say half of what they want, or do not listen: rows become free, the server goes on."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import httpx
import pytest

from dspark_runtime import Bundle, ServiceOptions
from dspark_serve.access import AccessRules
from dspark_serve.heads import http_protocol
from dspark_serve.streams import StreamLimits
from tests.serve.gate import Gate
from tests.serve.raw import connected, read_until, request
from tests.serve.running import NAME, Running, running

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
LONG: Any = {"model": NAME, "prompt": "once upon a time", "max_tokens": 200, "ignore_eos": True}


def figure(server: Running, name: str) -> float:
    """One line of the metrics; 0 if it is not there yet."""
    found = re.search(rf"^{re.escape(name)} (\S+)$", httpx.get(f"{server.url}/metrics").text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def eventually(holds: Callable[[], bool]) -> bool:
    """Whether something comes true."""
    deadline = time.monotonic() + 30
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


@pytest.mark.parametrize("stream", [True, False])
def test_a_row_is_free_one_step_after_its_client_left(opened: Bundle, stream: bool) -> None:
    gate = Gate()
    options = ServiceOptions(rows=2, queue=2, capacity=256, speculate="off")
    with running(opened, options, gate, limits=StreamLimits(patience=0.1)) as server:
        with connected(server.port) as made:
            made.sendall(request(COMPLETIONS, LONG | {"stream": stream}))
            gate.let(5)
            if stream:
                read_until(made, b"data: ")
            assert eventually(lambda: gate.steps == 6)  # the engine waits after its sixth step
        gone = f'dspark_requests_total{{reason="client_gone",route="{COMPLETIONS}",status="499"}}'
        assert eventually(lambda: figure(server, gone) == 1)
        assert figure(server, "dspark_running") == 1
        gate.let(1)
        assert eventually(lambda: figure(server, "dspark_running") == 0)
        assert gate.steps == 6  # no step was run for nobody
        assert 0 < figure(server, 'dspark_tokens_total{kind="generated"}') < 10
        gate.open()


def test_a_client_that_does_not_read_is_given_up(opened: Bundle) -> None:
    options = ServiceOptions(rows=2, queue=32, capacity=512)
    with running(opened, options, limits=StreamLimits(events=20)) as server:
        server.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # connections inherit it
        with connected(server.port, buffer=4096) as made:
            made.sendall(request(COMPLETIONS, LONG | {"max_tokens": 450, "stream": True, "n": 8}))
            made_tokens = 'dspark_tokens_total{kind="generated"}'
            assert eventually(lambda: figure(server, made_tokens) > 0) and server.idle()
            assert figure(server, made_tokens) < 8 * 450
            received = read_until(made, b'"code":"slow_client"')
            assert b"[DONE]" not in received
            slow = f'dspark_requests_total{{reason="slow_client",route="{COMPLETIONS}",status="499"}}'
            assert eventually(lambda: figure(server, slow) == 1)


def test_requests_cut_anywhere(server: Running) -> None:
    whole = request(CHAT, {"model": NAME, "messages": [{"role": "user", "content": "x"}], "max_tokens": 2})
    for end in range(1, len(whole), 7):
        with connected(server.port) as made:
            made.sendall(whole[:end])
    assert server.idle()
    answer = httpx.post(server.url + COMPLETIONS, json=LONG | {"max_tokens": 1})
    assert answer.status_code == 200


def test_streams_cut_anywhere(server: Running) -> None:
    whole = b""
    body = request(COMPLETIONS, LONG | {"max_tokens": 12, "stream": True}, "Connection: close\r\n")
    with connected(server.port) as made:
        made.sendall(body)
        whole = read_until(made, b"[DONE]")
    for end in range(0, len(whole), 211):
        with connected(server.port) as made:
            made.sendall(body)
            while end > 0 and (part := made.recv(min(end, 4096))):
                end -= len(part)
            made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")  # a reset, not a goodbye
    assert server.idle()
    with connected(server.port) as made:
        made.sendall(body)
        assert read_until(made, b"[DONE]")


def test_a_body_that_never_ends_is_not_waited_for(opened: Bundle) -> None:
    with running(opened, rules=AccessRules(body_seconds=0.2)) as server, connected(server.port) as made:
        made.sendall(request(CHAT, {"model": NAME})[:-4])
        answer = read_until(made, b"request_timeout")
        assert answer.startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize(
    "garbage",
    [b"\0" * 5000, b"GET / HTTP/9.9\r\n\r\n", b"POST " + b"x" * 70_000 + b" HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\0"],
)
def test_what_is_no_request_does_no_harm(server: Running, garbage: bytes) -> None:
    with connected(server.port) as made:
        made.sendall(garbage)
        made.shutdown(socket.SHUT_WR)
        while made.recv(65536):
            pass
    assert httpx.get(f"{server.url}/health/ready").status_code == 200


@pytest.mark.parametrize("head", [b"X-Long: " + b"x" * 10_000_000, b"X-More: yes\r\n" * 800_000], ids=["one", "many"])
def test_ten_megabytes_of_headers_are_not_read(server: Running, head: bytes) -> None:
    answer, sent = b"", 0
    with connected(server.port) as made, suppress(ConnectionError):  # closed with unread data: a reset may overtake it
        made.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n")
        for sent in range(0, len(head), 65536):
            made.sendall(head[sent : sent + 65536])
            made.settimeout(0.0 if sent < 65536 else 0.2)
            with suppress(BlockingIOError, TimeoutError):
                answer += made.recv(65536)
            made.settimeout(30)
            if answer:
                break
    assert sent < 4 * 2**20  # what the system keeps for the two ends
    assert not answer or (answer.startswith(b"HTTP/1.1 431") and b"headers_too_large" in answer)
    assert httpx.get(f"{server.url}/health/ready").status_code == 200


def test_half_a_head_is_not_waited_for(opened: Bundle) -> None:
    with running(opened, http=http_protocol(seconds=0.2)) as server:
        for part in (b"", b"POST /v1/completions HT", b"GET /health HTTP/1.1\r\nHost: x\r\n\r\nGET /hea"):
            with connected(server.port) as made:
                made.sendall(part)
                received = b""
                while more := made.recv(65536):
                    received += more
                assert received.count(b"HTTP/1.1 200") == part.count(b"GET /health HTTP")
        with httpx.Client(base_url=server.url) as client:  # a connection that is used again is not such a one
            assert [client.get("/health/ready").status_code for _ in range(3)] == [200] * 3
            time.sleep(0.3)
            assert client.get("/health/ready").status_code == 200
