"""An engine that takes a step only when a test lets it."""

from __future__ import annotations

import threading

from dspark_serve.metrics import Metrics


class Gate(Metrics):
    """Metrics whose service waits after each step until it may go on."""

    def __init__(self) -> None:
        super().__init__()
        self._permits = threading.Semaphore(0)
        self._open = False
        self.steps = 0

    def let(self, steps: int) -> None:
        """Allow this many more steps."""
        for _ in range(steps):
            self._permits.release()

    def open(self) -> None:
        """Allow all."""
        self._open = True
        self._permits.release()

    def stepped(self, prompt: bool, seconds: float) -> None:
        super().stepped(prompt, seconds)
        self.steps += 1
        if not self._open:
            assert self._permits.acquire(timeout=60)
