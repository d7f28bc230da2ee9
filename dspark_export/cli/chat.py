"""A conversation on the terminal: questions and answers until the end of input."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING, Any

import typer

from dspark_export.cli.printing import print_stats, write
from dspark_runtime.errors import CapacityError

if TYPE_CHECKING:
    from dspark_runtime import Bundle, Generation, Stream

_HELP = (
    "/reset forgets the conversation, /stats shows the last answer's statistics, /exit or Ctrl-D leaves; "
    "Ctrl-C ends an answer"
)


class Chat:
    """History and options of a conversation with one bundle.

    The history holds what was really said: an answer that Ctrl-C ended stays as far as it came, and a question that
    could not be answered is taken back.
    """

    def __init__(self, bundle: Bundle, system: str | None, options: dict[str, Any], stats: bool) -> None:
        self._bundle = bundle
        self._options = options
        self._stats = stats
        self._start = [] if system is None else [{"role": "system", "content": system}]
        self._messages = list(self._start)
        self._last: Generation | None = None

    def run(self) -> None:
        """Read questions until Ctrl-D or /exit."""
        with suppress(ImportError):
            import readline  # noqa: F401 - gives input() its editing and history

        typer.echo(f"{self._bundle.manifest.source.id}. {_HELP}.", err=True)
        while (line := _read()) is not None and line != "/exit":
            if line == "/reset":
                self._messages = list(self._start)
            elif line == "/stats":
                self._show_stats()
            elif line.startswith("/"):
                typer.echo(f"{line.split()[0]} is not a command. {_HELP}.", err=True)
            elif line:
                self._say(line)

    def _say(self, question: str) -> None:
        self._messages.append({"role": "user", "content": question})
        try:
            stream = self._bundle.chat(self._messages, stream=True, **self._options)
        except CapacityError as error:
            self._messages.pop()
            typer.echo(f"{error}; /reset starts a new conversation", err=True)
            return
        with _cancelling(stream):
            for chunk in stream:
                write(chunk.text)
        write("\n")
        self._last = stream.generations[0]
        self._messages.append({"role": "assistant", "content": self._last.text})
        if self._stats:
            print_stats(self._last)

    def _show_stats(self) -> None:
        if self._last is None:
            typer.echo("no answer yet", err=True)
        else:
            print_stats(self._last)


def _read() -> str | None:
    """The next line; None at the end of input. Ctrl-C clears the line."""
    try:
        return input("> ").strip()
    except EOFError:
        typer.echo("", err=True)
        return None
    except KeyboardInterrupt:
        typer.echo("", err=True)
        return ""
    except UnicodeDecodeError:
        typer.echo("that line is not UTF-8 text", err=True)
        return ""


@contextmanager
def _cancelling(stream: Stream) -> Iterator[None]:
    """Ctrl-C ends the text after the pass that runs, so that what was said so far is kept; a second one at once."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        stream.cancel()
        signal.signal(signal.SIGINT, previous)

    previous = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
