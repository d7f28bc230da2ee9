"""A real ``dspark-serve`` with bad clients, killed under load: what its clients see, and what it leaves behind."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen
from typing import Any

import httpx
import psutil
import pytest

from dspark_runtime import Bundle, PhraseOptions
from tests.serve.processes import process
from tests.serve.raw import connected, request
from tests.serve.test_clients_that_leave import eventually, figure

COMPLETIONS = "/v1/completions"
QUIET = ("--log-level", "warning")  # nobody reads its log, and it would wait once the pipe is full
ASKED: Any = {"model": "bundle", "prompt": "once upon a time", "ignore_eos": True, "temperature": 0}
EVERY_BYTE = pytest.param(1, marks=pytest.mark.slow)


@dataclass
class Started:
    """A server that runs."""

    process: Popen[str]
    url: str

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    def text(self, tokens: int = 4) -> str:
        """An answer, for which a client waits."""
        answer = httpx.post(self.url + COMPLETIONS, json=ASKED | {"max_tokens": tokens}, timeout=60)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["text"])

    def idle(self) -> bool:
        """Whether nothing runs or waits, once it does."""
        return eventually(lambda: not figure(self, "dspark_running") and not figure(self, "dspark_waiting"))


@pytest.fixture(scope="module")
def started(bundle: Path) -> Iterator[Started]:
    with process(bundle, *QUIET) as (running, url, _):
        yield Started(running, url)


@pytest.mark.parametrize("step", [EVERY_BYTE, 5])
def test_requests_cut_at_every_byte(started: Started, step: int) -> None:
    expected, whole = started.text(), request(COMPLETIONS, ASKED | {"max_tokens": 2})
    for end in range(1, len(whole), step):
        with connected(started.port) as made:
            made.sendall(whole[:end])
            if end % 2:
                made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")  # a reset, not a goodbye
    assert started.idle() and started.text() == expected


@pytest.mark.parametrize("step", [EVERY_BYTE, 61])
@pytest.mark.parametrize("stream", [True, False])
def test_answers_cut_at_every_byte(started: Started, step: int, stream: bool) -> None:
    expected = started.text()
    body = request(COMPLETIONS, ASKED | {"max_tokens": 2, "stream": stream}, "Connection: close\r\n")
    with connected(started.port) as made:
        made.sendall(body)
        whole = b"".join(iter(lambda: made.recv(65536), b""))
    for end in range(0, len(whole), step):
        with connected(started.port) as made:
            made.sendall(body)
            while end > 0 and (part := made.recv(end)):
                end -= len(part)
            made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
    assert started.idle() and started.text() == expected


def test_half_requests_and_slow_readers_keep_nobody(started: Started) -> None:
    expected, files = started.text(), psutil.Process(started.process.pid).num_fds()
    half = request(COMPLETIONS, ASKED)
    with ExitStack() as stack:
        for number in range(40):
            stack.enter_context(connected(started.port)).sendall(half[: 20 + 5 * number])
        for _ in range(4):  # more than there are rows
            slow = stack.enter_context(connected(started.port, buffer=4096))
            slow.sendall(request(COMPLETIONS, ASKED | {"max_tokens": 400, "stream": True}))
        assert started.text() == expected
        assert figure(started, "dspark_ready") == 1
    assert started.idle()
    assert eventually(lambda: psutil.Process(started.process.pid).num_fds() <= files)


def test_killed_under_load(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    temporary, store = tmp_path / "temporary", tmp_path / "phrases.store"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    Bundle.open(bundle, phrases=PhraseOptions(file=store)).phrases.save()
    kept, files = store.read_bytes(), sorted(path for path in bundle.rglob("*"))
    with process(bundle, *QUIET, "--store", str(store)) as (running, url, _):
        server = Started(running, url)
        expected, port, began_with = server.text(), server.port, set(temporary.iterdir())
        children = psutil.Process(running.pid).children(recursive=True)
        ends, begun = list[Exception | str](), threading.Semaphore(0)

        def client(stream: bool) -> None:
            try:
                asked = ASKED | {"max_tokens": 480, "stream": stream, "prompt": [ASKED["prompt"]] * 8}
                with httpx.stream("POST", url + COMPLETIONS, json=asked, timeout=60) as answer:
                    for part in answer.iter_text():
                        begun.release()
                        if "[DONE]" in part or not stream:
                            ends.append(part)
            except httpx.HTTPError as error:
                ends.append(error)

        clients = [threading.Thread(target=client, args=(stream,)) for stream in (True, True, False)]
        for thread in clients:
            thread.start()
        assert begun.acquire(timeout=60)
        running.send_signal(signal.SIGKILL)
        assert running.wait(30) == -signal.SIGKILL
        for thread in clients:
            thread.join(60)
        assert len(ends) == 3 and all(isinstance(end, httpx.HTTPError) for end in ends), ends
    assert not psutil.wait_procs(children, 30)[1]
    assert set(temporary.iterdir()) == began_with
    assert store.read_bytes() == kept and sorted(path for path in bundle.rglob("*")) == files
    with process(bundle, *QUIET, "--store", str(store), "--port", str(port)) as (running, url, _):
        again = Started(running, url)
        assert again.port == port and again.text() == expected
