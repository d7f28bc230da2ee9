"""``dspark-export serve`` and ``dspark-serve`` as processes: start, one request, signals, exit codes."""

from __future__ import annotations

import inspect
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI

from dspark_export.cli import main as command_line
from dspark_runtime import Bundle, PhraseOptions, ServiceOptions
from dspark_runtime.errors import CapacityError, UsageError
from dspark_serve import cli
from dspark_serve.server import ServerOptions, serve
from tests.serve.processes import COMMANDS, process


@pytest.mark.parametrize("command", COMMANDS)
def test_start_answer_and_stop(bundle: Path, command: str, tmp_path: Path) -> None:
    store = tmp_path / "phrases.store"
    with process(bundle, "--store", str(store), command=command) as (started, url, said):
        assert re.search(r"2 rows of 512 tokens: the caches take up to \d+ MiB \([\d.]+ MiB a row\)", said[0])
        name = "bundle"
        client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        assert client.models.list().data[0].id == name
        answer = client.chat.completions.create(
            model=name, messages=[{"role": "user", "content": "hi"}], max_tokens=3, extra_body={"ignore_eos": True}
        )
        assert answer.usage is not None and answer.usage.completion_tokens == 3
        started.send_signal(signal.SIGTERM)
        _, errors = started.communicate(timeout=60)
        assert started.returncode == 0
        assert Bundle.open(bundle, phrases=PhraseOptions(file=store)).phrases.contexts() > 0
        lines = [json.loads(line) for line in errors.splitlines()]  # nothing else is written there
        assert [line["path"] for line in lines if "path" in line] == ["/v1/models", "/v1/chat/completions"]


@pytest.mark.parametrize(("drain", "ends"), [("60", "[DONE]"), ("0", "unavailable")])
def test_a_signal_drains(bundle: Path, drain: str, ends: str) -> None:
    with process(bundle, "--drain", drain) as (started, url, _):
        body = {"model": "bundle", "prompt": ["x"] * 6, "max_tokens": 400, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as stream:
            parts = stream.iter_text()
            text = next(parts)
            started.send_signal(signal.SIGTERM)
            if drain != "0":
                for _ in range(200):
                    ready = httpx.get(f"{url}/health/ready")
                    if ready.status_code == 503:
                        break
                assert ready.json() == {"status": "draining"}
                assert httpx.post(f"{url}/v1/completions", json=body).status_code == 503
            text += "".join(parts)
        assert ends in text[-300:]
        started.communicate(timeout=60)
        assert started.returncode == 0


def test_a_second_signal_cancels(bundle: Path) -> None:
    with process(bundle, "--drain", "600") as (started, url, _):
        body = {"model": "bundle", "prompt": ["x"] * 30, "max_tokens": 500, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as stream:
            parts = stream.iter_text()
            next(parts)
            started.send_signal(signal.SIGINT)
            while httpx.get(f"{url}/health/ready").json() != {"status": "draining"}:
                pass
            started.send_signal(signal.SIGINT)
            assert "unavailable" in "".join(parts)[-300:]
        started.communicate(timeout=60)
        assert started.returncode == 0


def test_what_cannot_start(bundle: Path, tmp_path: Path) -> None:
    def start(service: ServiceOptions | None = None, **options: Any) -> None:
        serve(bundle, ServerOptions(port=0, service=service or ServiceOptions(), **options), threads=1)

    with pytest.raises(CapacityError, match=r"there is room for \d+ rows"):
        start(ServiceOptions(rows=1000, memory=10**7))
    with pytest.raises(UsageError, match="magic"):
        start(ServiceOptions(speculate="magic"))
    with pytest.raises(UsageError, match="cannot be read"):
        start(api_keys=tmp_path / "none")
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UsageError, match="cannot listen"):
        serve(bundle, ServerOptions(port=taken.getsockname()[1]))
    line = [sys.executable, "-m", "dspark_serve", str(tmp_path), "--port", "0"]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 7 and done.stderr.startswith("dspark-serve: ") and "Traceback" not in done.stderr


@pytest.mark.parametrize("module", ["dspark_serve", "dspark_export.cli.main"])
@pytest.mark.parametrize("missing", ["fastapi", "uvicorn", "llguidance"])
def test_without_the_extra_it_says_what_to_install(module: str, missing: str, tmp_path: Path) -> None:
    hidden = f"import sys\nsys.modules[{missing!r}] = None\n"
    (tmp_path / "sitecustomize.py").write_text(hidden)
    path = os.pathsep.join([str(tmp_path), *(p for p in sys.path if p)])
    verb = ["serve"] if "export" in module else []
    line = [sys.executable, "-m", module, *verb, str(tmp_path)]
    done = subprocess.run(line, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and 'pip install "dspark-runtime[cpu,serve]"' in done.stderr, done.stderr


def test_defaults_are_those_of_the_options() -> None:
    given = {name: parameter.default for name, parameter in inspect.signature(cli.serve).parameters.items()}
    server, service = ServerOptions(), ServiceOptions()
    names = {"max_length": "capacity", "served_name": "name", "api_key_file": "api_keys", "cors": "origins"}
    for name, default in given.items():
        own = names.get(name, name)
        for options in (server, service):
            if hasattr(options, own):
                assert default == (getattr(options, own) or None if own == "origins" else getattr(options, own)), name
    assert command_line.serve is cli.serve


@pytest.mark.parametrize(
    ("given", "phrases"),
    [
        ({}, PhraseOptions()),
        ({"share_history": True}, PhraseOptions(shared=True)),
        ({"history": False, "store": Path("x")}, PhraseOptions(0, file=Path("x"))),
    ],
)
def test_what_is_remembered(monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], phrases: PhraseOptions) -> None:
    started: list[ServerOptions] = []
    monkeypatch.setattr("dspark_serve.server.serve", lambda _, options, *rest, **more: started.append(options))
    monkeypatch.setattr(cli, "_log_to_stderr", lambda level: None)
    cli.serve(Path("bundle"), **given)
    assert [options.phrases for options in started] == [phrases]
    with pytest.raises(UsageError, match="no-history"):
        cli.serve(Path("bundle"), history=False, share_history=True)


def test_the_engine_failing_twice_ends_the_process(bundle: Path) -> None:
    """A real process whose engine raises in every pass after the first request."""
    program = f"""
import sys
from pathlib import Path
from dspark_runtime.backends import ort
from dspark_runtime.errors import BackendError
from dspark_serve import cli

broken = False

def finish(self, _old=ort.OrtRunner.finish):
    if broken:
        raise BackendError("the device is gone")
    return _old(self)
ort.OrtRunner.finish = finish

def watch():
    global broken
    sys.stdin.readline()
    broken = True
import threading
threading.Thread(target=watch, daemon=True).start()
sys.argv = ["dspark-serve", {str(bundle)!r}, "--port", "0", "--threads", "1"]
cli.main()
"""
    started = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    killer = threading.Timer(100, started.kill)
    killer.start()
    try:
        assert started.stdout and started.stdin
        url = next(found[1] for text in started.stdout if (found := re.search(r"is ready at (\S+)$", text)))
        started.stdin.write("now\n")
        started.stdin.flush()
        statuses = []
        with suppress(httpx.HTTPError):  # until the process has ended
            while True:
                body = {"model": "bundle", "prompt": "x", "ignore_eos": True}
                statuses.append(httpx.post(f"{url}/completions", json=body, timeout=60).status_code)
        _, errors = started.communicate(timeout=60)
        assert started.returncode == 8, errors
        assert statuses[0] == 500 and set(statuses) <= {500, 503}
        assert "the device is gone" in errors
    finally:
        killer.cancel()
        started.kill()
        started.communicate()
