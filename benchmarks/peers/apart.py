"""Peers in processes of their own: a program that crashes or hangs ends alone, and the others go on."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.peers.models import SharedModel
from benchmarks.peers.protocol import Candidate, Missing, Timed

_MOST_SECONDS = 900.0  # of loading, which may convert weights first, and of one run


class Crashed(Exception):
    """A peer's process ended, or did not answer; the message says how."""


class ApartPeer:
    """The peer ``name`` of the module ``source``, loaded in a new process.

    Raises:
        Missing: the peer cannot take part.
        Crashed: its process ended while it loaded.
    """

    setting = None

    def __init__(
        self, source: str, name: str, model: SharedModel, threads: int, seconds: float = _MOST_SECONDS
    ) -> None:
        self.name, self._seconds = name, seconds
        fresh = multiprocessing.get_context("spawn")
        self._connection, theirs = fresh.Pipe()
        self._process = fresh.Process(target=_serve, args=(theirs, source, name, model, threads), daemon=True)
        self._process.start()
        theirs.close()
        kind, value = self._answer("loading")
        if kind == "missing":
            self.close()
            raise Missing(value)
        self.precision, self.family = value

    def generate(self, prompt: Sequence[int], max_new_tokens: int) -> Timed:
        """One run, timed in the peer's process."""
        try:
            self._connection.send((list(prompt), max_new_tokens))
        except OSError as error:
            raise Crashed(self._how("between two runs")) from error
        result: Timed = self._answer("generating")[1]
        return result

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.join(5.0)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _answer(self, doing: str) -> tuple[str, Any]:
        try:
            if not self._connection.poll(self._seconds):
                self._process.kill()
                raise Crashed(f"no answer within {self._seconds:.0f} s while {doing}")
            kind, value = self._connection.recv()
        except (EOFError, OSError) as error:
            raise Crashed(self._how(f"while {doing}")) from error
        if kind == "failed":
            raise Crashed(f"failed while {doing}: {value}")
        return kind, value

    def _how(self, when: str) -> str:
        self._process.join(5.0)
        code = self._process.exitcode
        if code is not None and code < 0:
            return f"ended by {signal.Signals(-code).name} {when}"
        return f"ended with exit code {code} {when}"


def apart(source: str, candidate: Candidate, model: SharedModel, threads: int) -> Candidate:
    """``candidate`` of the module ``source``, to be loaded in a process of its own."""
    return Candidate(candidate.name, lambda: ApartPeer(source, candidate.name, model, threads))


def _serve(connection: Connection, source: str, name: str, model: SharedModel, threads: int) -> None:
    os.environ["OMP_NUM_THREADS"] = str(threads)
    try:
        module = importlib.import_module(source)
        peer = next(c for c in module.candidates(model, threads) if c.name == name).load()
    except Missing as reason:
        connection.send(("missing", str(reason)))
        return
    except Exception as error:
        connection.send(("failed", f"{type(error).__name__}: {error}"))
        return
    connection.send(("ready", (peer.precision, peer.family)))
    while True:
        try:
            prompt, count = connection.recv()
        except EOFError:
            return
        try:
            connection.send(("ran", peer.generate(prompt, count)))
        except Exception as error:
            connection.send(("failed", f"{type(error).__name__}: {error}"))
