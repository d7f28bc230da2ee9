"""What goes between the engine and a client, and how long a client may keep it waiting."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from sse_starlette import EventSourceResponse
from sse_starlette.sse import SendTimeoutError

from dspark_serve import sse
from dspark_serve.streams import Channel, StreamLimits
from tests.serve.running import NAME, Running


class Cancelled(Channel):
    """Notes that it was cancelled."""

    cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


def test_a_client_that_takes_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "SEND_SECONDS", 0.05)
    assert "_send_with_timeout" in vars(EventSourceResponse)  # which EventStream replaces
    closed = []

    async def events() -> AsyncIterator[bytes]:
        try:
            while True:
                yield b"data: x\n\n"
        finally:
            closed.append(True)

    async def receive() -> Any:
        await asyncio.sleep(60)

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            await asyncio.sleep(60)

    async def respond() -> Channel:
        channel = Cancelled(StreamLimits())
        with pytest.raises(SendTimeoutError):
            await sse.EventStream(channel, events())({"type": "http", "method": "POST"}, receive, send)
        return channel

    channel = asyncio.run(asyncio.wait_for(respond(), 30))
    assert channel.cancelled and closed


@pytest.mark.parametrize("stream", [True, False])
def test_a_whole_answer_wakes_the_event_loop_once(
    server: Running, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    heard, put = [], Channel.put
    monkeypatch.setattr(Channel, "put", lambda self, item: (heard.append(item), put(self, item)))
    body = {"model": NAME, "prompt": ["one two", "three"], "max_tokens": 20, "stream": stream, "ignore_eos": True}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200
    assert len(heard) == 2 if not stream else len(heard) > 6
