"""What long-running commands share: progress on stderr, and an interruption that leaves nothing behind."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn

ProgressForm = Literal["auto", "json", "off"]
"""``auto`` draws on a terminal only, ``json`` writes one object per step."""

TERMINATED = 143


@contextmanager
def bars(*columns: ProgressColumn, form: ProgressForm = "auto", transient: bool = False) -> Iterator[Progress]:
    """Bars on stderr, hidden where it is not a terminal or ``form`` is not ``auto``."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    hidden = form != "auto" or not console.is_terminal
    with Progress(*columns, console=console, disable=hidden, transient=transient) as progress:
        yield progress


def write_step(**facts: str | int) -> None:
    """Write one step as a line of JSON to stderr."""
    print(json.dumps(facts), file=sys.stderr, flush=True)


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM unwinds a command as Ctrl-C does, so that nothing is left behind.

    Raises SystemExit, which is not an Exception: an interrupted library would take one for its own failure.
    """

    def stop(number: int, frame: object) -> None:
        raise SystemExit(TERMINATED)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
