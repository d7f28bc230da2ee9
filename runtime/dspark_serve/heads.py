"""Bounds on the head of an HTTP request: its size, and how long it may take to come.

uvicorn has neither where it parses with httptools: headers are kept as long as they come, and a connection that sends
half of them stays open. Where httptools is missing, h11 takes its place, which refuses heads of more than 64 KiB.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

from dspark_serve.errors import error_body

MOST_HEAD_BYTES = 64 * 1024
HEAD_SECONDS = 60.0


def http_protocol(most: int = MOST_HEAD_BYTES, seconds: float = HEAD_SECONDS) -> Any:
    """For the setting ``http`` of :class:`uvicorn.Config`.

    A connection whose head is longer than ``most`` bytes is answered 431 and closed, one whose head is not complete
    after ``seconds`` is closed.
    """
    try:
        # httptools: only where a server starts
        from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
    except ModuleNotFoundError:
        return "h11"

    class Bounded(HttpToolsProtocol):
        """One connection."""

        def __init__(self, *args: Any, **settings: Any) -> None:
            super().__init__(*args, **settings)
            self._in_head, self._head_bytes = True, 0
            self._timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._wait()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_waiting()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if self._in_head:
                self._head_bytes += len(data)
            super().data_received(data)
            if self._in_head and self._head_bytes > most and not self.transport.is_closing():
                self.transport.write(_refusal(most))
                self.transport.close()

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self._wait()

        def on_headers_complete(self) -> None:
            self._in_head = False
            self._stop_waiting()
            super().on_headers_complete()

        def on_message_complete(self) -> None:
            self._in_head, self._head_bytes = True, 0
            super().on_message_complete()

        def _wait(self) -> None:
            self._stop_waiting()
            self._timer = self.loop.call_later(seconds, self.transport.close)

        def _stop_waiting(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    return Bounded


def _refusal(most: int) -> bytes:
    body = json.dumps(error_body(431, f"the headers are longer than {most} bytes", "headers_too_large")).encode()
    head = "HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: application/json\r\nconnection: close\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body
