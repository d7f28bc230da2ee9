"""Requests written to a socket byte by byte, as no client library would."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def request(path: str, body: Any, headers: str = "") -> bytes:
    """A whole POST request with a JSON body."""
    data = json.dumps(body).encode()
    fields = f"Host: 127.0.0.1\r\nContent-Type: application/json\r\n{headers}Content-Length: {len(data)}\r\n"
    return f"POST {path} HTTP/1.1\r\n{fields}\r\n".encode() + data


@contextmanager
def connected(port: int, buffer: int | None = None) -> Iterator[socket.socket]:
    """A connection; ``buffer`` bytes of it are kept by the system for a reader that is slow."""
    with socket.socket() as made:
        if buffer is not None:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        made.settimeout(30)
        made.connect(("127.0.0.1", port))
        yield made


def read_until(made: socket.socket, mark: bytes) -> bytes:
    """What comes up to ``mark``, and maybe more."""
    found = b""
    while mark not in found:
        part = made.recv(65536)
        assert part, f"the server closed the connection after {found!r}"
        found += part
    return found
