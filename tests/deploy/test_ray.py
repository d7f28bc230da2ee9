"""Several copies of a model: how requests are given to them, and the real Ray Serve with one that dies."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from openai import APIError, OpenAI

from dspark_export.deploy.check import SERVER_READY
from dspark_export.deploy.running import running
from dspark_runtime import Bundle, ServiceOptions
from dspark_serve.replica import Replica, prefix_of, ranked
from tests.deploy.test_command import deploy
from tests.shared.folders import CACHE

PROMPT = "Once upon a time"
SCOPE = {"type": "http", "http_version": "1.1", "method": "POST", "scheme": "http", "path": "/v1/completions"}
SCOPE |= {"query_string": b"", "headers": [(b"content-type", b"application/json")], "client": ("127.0.0.1", 1)}


# Without Ray


def test_a_prefix_keeps_its_replica_when_others_come_and_go() -> None:
    names = [f"replica-{number}" for number in range(5)]
    prefixes = [f"text {number}" for number in range(200)]
    first = {prefix: names[ranked(prefix, names)[0]] for prefix in prefixes}
    assert set(first.values()) == set(names)
    rest = names[:2] + names[3:]
    for prefix in prefixes:
        now = rest[ranked(prefix, rest)[0]]
        assert now == first[prefix] or first[prefix] == names[2]
        assert sorted(ranked(prefix, names)) == list(range(5))


@pytest.mark.parametrize(
    ("body", "prefix"),
    [
        (b'{"prompt": "Once"}', "Once"),
        (b'{"prompt": [1, 2]}', "[1, 2]"),
        (b'{"messages": [{"role": "user"}], "prompt": "x"}', '[{"role": "user"}]'),
        (b'{"prompt": "' + b"a" * 1000 + b'"}', "a" * 256),
        (b"{}", ""), (b"[]", ""), (b"\xff", ""), (b"", ""),
    ],
)  # fmt: skip
def test_prompts_that_begin_alike_have_one_prefix(body: bytes, prefix: str) -> None:
    assert prefix_of(body) == prefix


def test_a_replica_answers_and_is_cancelled(bundle: Path, opened: Bundle) -> None:
    replica = Replica(bundle, "tiny", ServiceOptions(rows=2, capacity=2048), drain=0.0, threads=1)

    async def all_messages(body: dict[str, Any]) -> list[Any]:
        return [message async for message in replica.answer(SCOPE, json.dumps(body).encode())]

    async def first_message(body: dict[str, Any]) -> None:
        messages = replica.answer(SCOPE, json.dumps(body).encode())
        async for message in messages:
            if message.get("body"):
                break
        assert replica._served.service.stats().running == 1
        await messages.aclose()
        while replica._served.service.stats().running:
            await asyncio.sleep(0.01)

    async def both() -> None:
        asked = {"model": "tiny", "prompt": PROMPT, "temperature": 0}
        head, *rest = await all_messages(asked | {"max_tokens": 8})
        answer = json.loads(b"".join(message["body"] for message in rest))
        assert head["status"] == 200
        assert answer["choices"][0]["text"] == opened.generate(PROMPT, max_new_tokens=8).text
        await asyncio.wait_for(first_message(asked | {"max_tokens": 2000, "stream": True, "ignore_eos": True}), 60)

    try:
        asyncio.run(both())
        replica.check_health()
    finally:
        replica.close()


# With Ray


@pytest.fixture
def ray_python(bundle: Path, tmp_path: Path) -> Path:
    """A Python with Ray, in ``.cache/ray``, with what a deployment says it needs."""
    deploy(bundle, "--target", "ray", "--out", tmp_path / "needs")
    environment = CACHE.parent / "ray"
    python = environment / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    pip = [python, "-m", "pip", "install", "--quiet", "-r", tmp_path / "needs" / "requirements.txt"]
    done = subprocess.run(pip, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"Ray cannot be installed: {done.stderr.strip().splitlines()[-1]}")
    return python


def models(server: psutil.Process) -> list[psutil.Process]:
    """Processes that run a copy of the model."""
    found = []
    for process in server.children(recursive=True):
        try:
            if "ServeReplica" in "".join(process.cmdline()) and "Model" in "".join(process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


@pytest.mark.slow
def test_prompts_find_their_replica_and_one_that_dies_is_replaced(
    bundle: Path, opened: Bundle, ray_python: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    out = tmp_path / "new"
    sizes = ["--rows", 16, "--max-length", 2048, "--threads", 1, "--no-exact"]  # exact rows are not reused here
    assert deploy(bundle, "--target", "ray", "--out", out, "--name", "tiny", *sizes).exit_code == 0
    environment = {"PYTHON": str(ray_python), "HOME": str(tmp_path), "RAY_USAGE_STATS_ENABLED": "0"}
    with running([str(out / "start.sh")], environment, SERVER_READY, 300) as server:
        client = OpenAI(
            base_url=f"http://127.0.0.1:{server.ports['HTTP']}/v1", api_key="none", max_retries=0, timeout=120
        )

        def ask(prompt: str, tokens: int = 8) -> Any:
            return client.completions.create(model="tiny", prompt=prompt, max_tokens=tokens, temperature=0)

        assert ask(PROMPT).choices[0].text == opened.generate(PROMPT, max_new_tokens=8).text
        beginnings = [f"Chapter {number}: " + "it was a dark and stormy night. " * 10 for number in range(12)]
        for beginning in beginnings:
            ask(beginning)
        again = [ask(beginning + "And then").usage.prompt_tokens_details.cached_tokens for beginning in beginnings]
        assert all(again), again

        endless: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 2000, "extra_body": {"ignore_eos": True}}
        with client.completions.create(model="tiny", stream=True, **endless) as left:
            next(iter(left))
        deadline = time.monotonic() + 60  # either replica answers, and one of them had it
        while not json.loads(server.ask("/health")[1])["counts"]["ended"].get("cancelled"):
            assert time.monotonic() < deadline

        process = psutil.Process(server.process.pid)
        assert len(models(process)) == 2
        ended: list[str] = []
        begun = threading.Event()

        def stream(number: int) -> None:
            try:
                asked = {"prompt": f"{number} {PROMPT}", "max_tokens": 1500, "extra_body": {"ignore_eos": True}}
                for _ in client.completions.create(model="tiny", stream=True, **asked):
                    begun.set()
                ended.append("whole")
            except Exception as error:
                ended.append(type(error).__name__)

        threads = [threading.Thread(target=stream, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        assert begun.wait(60)
        victim = models(process)[0]
        victim.kill()
        for number in range(8):  # of those that are not begun when it dies, none is lost
            assert ask(f"{number}: {PROMPT}").choices[0].finish_reason == "length"
        for thread in threads:
            thread.join(120)
            assert not thread.is_alive()
        assert len(ended) == 8 and "whole" in ended, ended
        deadline = time.monotonic() + 120
        while len(models(process)) < 2 or victim.pid in [found.pid for found in models(process)]:
            assert time.monotonic() < deadline
            time.sleep(0.5)
        with pytest.raises(APIError, match="max_tokens"):
            ask(PROMPT, tokens=0)
