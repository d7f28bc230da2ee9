"""A tiny stand-in for the hub: the three kinds of request huggingface_hub makes to download a snapshot."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "1234567890abcdef1234567890abcdef12345678"


@dataclass
class Hub:
    """``repos`` maps ids to folders; ``refusals`` ids to (status, X-Error-Code); ``renamed`` old ids to new ones."""

    repos: dict[str, Path] = field(default_factory=dict)
    refusals: dict[str, tuple[int, str]] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)
    url: str = ""


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.split("?")[0]
            hub.requests.append(path)
            hub.tokens.add(self.headers.get("Authorization"))
            api = path.startswith("/api/models/")
            parts = path.removeprefix("/api/models/").removeprefix("/").split("/")
            name, rest = "/".join(parts[:2]), parts[2:]
            if name in hub.renamed:
                return self.answer(307, b"", Location=hub.url + path.replace(name, hub.renamed[name], 1))
            if name in hub.refusals:
                status, code = hub.refusals[name]
                return self.answer(
                    status, b'{"error": "refused"}', **{"X-Error-Code": code, "X-Error-Message": "refused"}
                )
            if name not in hub.repos:
                return self.answer(404, b'{"error": "none"}', **{"X-Error-Code": "RepoNotFound"})
            if len(rest) > 1 and rest[1] not in ("main", COMMIT):
                return self.answer(404, b'{"error": "none"}', **{"X-Error-Code": "RevisionNotFound"})
            folder = hub.repos[name]
            if not api:
                return self.file(folder / rest[2])
            files = sorted(entry for entry in folder.iterdir() if entry.is_file())
            if rest[:1] == ["tree"]:
                listing = [
                    {"type": "file", "oid": _oid(entry), "size": entry.stat().st_size, "path": entry.name}
                    for entry in files
                ]
                return self.answer(200, json.dumps(listing).encode())
            siblings = [{"rfilename": entry.name} for entry in files]
            return self.answer(200, json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}).encode())

        def file(self, path: Path) -> None:
            if not path.is_file():
                return self.answer(404, b"", **{"X-Error-Code": "EntryNotFound"})
            self.answer(200, path.read_bytes(), ETag=f'"{_oid(path)}"', **{"X-Repo-Commit": COMMIT})

        def answer(self, status: int, body: bytes, **headers: str) -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    return Handler


def _oid(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Run the hub on a free local port while active."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
