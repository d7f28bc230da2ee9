"""Server-sent events: how a stream of chunks goes over the wire, and what ends it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any

from pydantic_core import to_json
from sse_starlette import EventSourceResponse, ServerSentEvent
from sse_starlette.sse import SendTimeoutError
from starlette.types import Message, Receive, Scope, Send

from dspark_serve.errors import ApiError
from dspark_serve.streams import Channel

PING_SECONDS = 15
SEND_SECONDS = 60.0
"""A client that takes nothing for this long is given up."""

DONE = b"data: [DONE]\n\n"


def event(data: Mapping[str, Any]) -> bytes:
    """One event whose data is JSON."""
    return b"data: %b\n\n" % to_json(data)


class EventStream(EventSourceResponse):
    """Sends what ``source`` yields, then ``[DONE]``; an error of it as an event, without ``[DONE]``.

    The requests of ``channel`` are cancelled as soon as the client has gone, and whatever else ends the response.
    """

    def __init__(
        self, channel: Channel, source: AsyncIterator[bytes], headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(
            _whole(source),
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **(headers or {})},
            ping=PING_SECONDS,
            ping_message_factory=lambda: ServerSentEvent(comment="ping"),
            sep="\n",
            send_timeout=SEND_SECONDS,
        )
        self._channel = channel

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._channel.cancel()

    async def _send_with_timeout(self, send: Send, message: Message) -> None:
        """Send one message. The library's own way does the same with a cancel scope of anyio, which takes more of the
        processor than all the rest of sending an event."""
        try:
            async with asyncio.timeout(self.send_timeout):
                await send(message)
        except TimeoutError as error:
            raise SendTimeoutError from error


async def _whole(source: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    try:
        async for part in source:
            yield part
    except ApiError as error:
        yield event(error.body())
    else:
        yield DONE
