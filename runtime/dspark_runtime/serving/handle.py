"""One request of a service, and what a service says of itself."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from dspark_runtime.decoding.request import Request
from dspark_runtime.decoding.sequence import Generation, SequenceState
from dspark_runtime.serving.events import Event, Failed, Finished, Listener

Health = Literal["ready", "draining", "unhealthy", "stopped"]

_log = logging.getLogger(__name__)


class Handle:
    """One request of a service, in the hands of its sender. All methods may be called from any thread.

    ``submitted``, ``admitted``, ``first_token`` and ``ended`` are times of ``time.monotonic()``, 0 until they come.
    """

    def __init__(
        self, request: Request, listener: Listener | None, number: int, cancel: Callable[[Handle], None]
    ) -> None:
        self.request = request
        self.number = number
        self.priority = 0
        self.deadline: float | None = None
        self.submitted = self.admitted = self.first_token = self.ended = 0.0
        self.sequence: SequenceState | None = None
        self.outcome: Finished | Failed | None = None
        self._cancel, self._listener = cancel, listener
        self._over = threading.Event()

    def cancel(self) -> None:
        """End the request before the next step; returns at once, and does nothing if it has ended."""
        self._cancel(self)

    def result(self, timeout: float | None = None) -> Generation:
        """Wait for the text.

        Raises:
            TimeoutError: it has not ended after ``timeout`` seconds.
            DsparkError: the request failed.
        """
        if not self._over.wait(timeout):
            raise TimeoutError(f"request {self.number} has not ended after {timeout} seconds")
        if isinstance(self.outcome, Failed):
            raise self.outcome.error
        assert self.outcome is not None
        return self.outcome.generation

    def tell(self, event: Event) -> None:
        """Give an event to the sender; one who fails is not asked again, and the request is cancelled."""
        if self._listener is not None:
            try:
                self._listener(event)
            except Exception:
                _log.exception("the listener of request %d failed; the request is cancelled", self.number)
                self._listener = None
                self.cancel()
        if isinstance(event, Finished | Failed):
            self._over.set()


@dataclass
class Counts:
    """Requests, tokens and steps since the service began."""

    accepted: int = 0
    refused: int = 0
    ended: dict[str, int] = field(default_factory=dict)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    rounds: int = 0
    chunks: int = 0


@dataclass(frozen=True)
class ServiceStats:
    """What a service is doing now, and what it has done."""

    health: Health
    rows: int
    capacity: int
    running: int
    waiting: int
    heartbeat: float
    counts: Counts

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)
