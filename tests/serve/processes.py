"""Real servers in processes of their own."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

COMMANDS = {"dspark-export": ["dspark_export.cli.main", "serve"], "dspark-serve": ["dspark_serve"]}


@contextmanager
def process(bundle: Path, *arguments: str, command: str = "dspark-serve") -> Iterator[tuple[Any, str, list[str]]]:
    """The process, its URL and the lines it printed before that; killed if it still runs at the end."""
    module, *verb = COMMANDS[command]
    line = [sys.executable, "-m", module, *verb, str(bundle), "--port", "0", "--threads", "1", "--rows", "2"]
    started = subprocess.Popen(
        [*line, "--max-length", "512", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    said: list[str] = []
    try:
        assert started.stdout is not None
        for text in started.stdout:
            said.append(text)
            if found := re.search(r"is ready at (\S+)/v1$", text):
                yield started, found[1], said
                break
        else:
            pytest.fail(f"it did not start: {said} {started.stderr and started.stderr.read()}")
    finally:
        started.kill()
        started.communicate()
