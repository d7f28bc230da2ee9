"""What a service tells the sender of a request: that it started, its text as it comes, and how it ended.

Every request gets at most one :class:`Started`, then any number of :class:`Tokens`, then exactly one
:class:`Finished` or :class:`Failed`, and nothing after it, whatever happens to the service.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dspark_runtime.decoding.sequence import Chunk, Generation
from dspark_runtime.errors import DsparkError


@dataclass(frozen=True, slots=True)
class Started:
    """The request left the queue: ``queued`` seconds after it was submitted."""

    queued: float


@dataclass(frozen=True, slots=True)
class Tokens:
    """What one step gave: one token, or as many as a round accepted."""

    chunk: Chunk


@dataclass(frozen=True, slots=True)
class Finished:
    """The text has ended. ``generation.finish_reason`` says why; ``cancelled`` if the sender wanted so."""

    generation: Generation


@dataclass(frozen=True, slots=True)
class Failed:
    """The request ended without a complete text; ``generation`` is what there was of it, None if it never started."""

    error: DsparkError
    generation: Generation | None = None


Event = Started | Tokens | Finished | Failed
Listener = Callable[[Event], None]
