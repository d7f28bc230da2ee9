"""Calls transformers without its log output: the messages that matter are raised as errors of this project."""

from __future__ import annotations

import logging as python_logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet() -> Iterator[None]:
    """Neither log lines nor progress bars of transformers while active; its settings come back afterwards."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def heard() -> Iterator[list[str]]:
    """Like :func:`quiet`, but with a list of the warnings that transformers logs while active, for the caller to act
    on or to pass on."""
    from transformers.utils import logging

    said: list[str] = []
    listener = _Listener(said)
    with quiet():
        logging.set_verbosity_warning()
        logging.disable_default_handler()
        logging.add_handler(listener)
        try:
            yield said
        finally:
            logging.remove_handler(listener)
            logging.enable_default_handler()


class _Listener(python_logging.Handler):
    def __init__(self, said: list[str]) -> None:
        super().__init__(python_logging.WARNING)
        self._said = said

    def emit(self, record: python_logging.LogRecord) -> None:
        self._said.append(record.getMessage())


def first_line(error: BaseException) -> str:
    """The message of ``error`` on one line of bounded length; its type if it has none."""
    return " ".join(str(error).split())[:300] or type(error).__name__
