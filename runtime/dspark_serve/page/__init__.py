"""The page at ``/``: a chat that shows who proposed every token, and a view of the metrics.

Three files as they are, without a build step. They load nothing from elsewhere: the policy in their headers forbids it.
"""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from starlette.responses import FileResponse, Response

from dspark_serve.errors import ApiError

FILES = {"index.html": "text/html", "page.css": "text/css", "page.js": "text/javascript"}
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cache-Control": "no-cache",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

router = APIRouter(include_in_schema=False)


@router.get("/")
async def index() -> Response:
    """The page."""
    return _file("index.html")


@router.get("/page/{name}")
async def part(name: str) -> Response:
    """A file of the page."""
    if name not in FILES:
        raise ApiError(404, f"no file {name!r:.60}; the page has {', '.join(FILES)}")
    return _file(name)


def _file(name: str) -> Response:
    path = Path(__file__).with_name(name)
    return FileResponse(path, media_type=f"{FILES[name]}; charset=utf-8", headers=_HEADERS)
