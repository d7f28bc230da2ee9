"""What a service reports beside what its loop does: for metrics and logs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dspark_runtime.decoding.observer import Observer
from dspark_runtime.serving.events import Failed, Finished

if TYPE_CHECKING:
    from dspark_runtime.serving.handle import Handle


class ServiceObserver(Observer):
    """Does nothing; override what you want to know. The methods of :class:`Observer` come from the loop.

    :meth:`queued` is called on the thread that submits, everything else on the engine's, between two steps. Be quick
    and change nothing.
    """

    def queued(self, handle: Handle) -> None:
        """A request was accepted and waits."""

    def refused(self, reason: str) -> None:
        """A request was refused when it was submitted, for ``reason`` ``overloaded``, ``stopped`` or ``unhealthy``."""

    def admitted(self, handle: Handle) -> None:
        """A request was given a row."""

    def first_token(self, handle: Handle) -> None:
        """The first token of a request is known; it is about to be given to the sender."""

    def ended(self, handle: Handle, event: Finished | Failed) -> None:
        """A request has ended."""

    def stepped(self, prompt: bool, seconds: float) -> None:
        """A step was run: a chunk of a prompt, or a round."""
