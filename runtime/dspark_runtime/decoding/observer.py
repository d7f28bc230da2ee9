"""What a decoding loop reports to its observers: timelines, traces, validation, metrics."""

from __future__ import annotations

from collections.abc import Sequence

from dspark_runtime.decoding.round import Accepted, Flight
from dspark_runtime.decoding.sequence import Chunk


class Observer:
    """Does nothing; override what you want to know.

    A loop calls every method on its own thread, in the order of a round: :meth:`started`, :meth:`committed` for each
    sequence, :meth:`finished`, :meth:`settled`. Where passes run beside the host, a round is settled after the next one
    has started. Be quick and change nothing; an exception ends the loop's step.
    """

    def started(self, flight: Flight) -> None:
        """A pass over all running sequences was started; its drafting and filling are over."""

    def committed(self, accepted: Accepted, flight: Flight) -> None:
        """The pass gave one sequence tokens. ``flight.buffers`` are valid until the call returns: copy what you keep.

        Logits of the sequence are ``flight.buffers.logits[accepted.row]``, unless the backend verified on its device.
        """

    def finished(self, flight: Flight) -> None:
        """Everything the pass gave is committed; all times of ``flight`` are set."""

    def settled(self, chunks: Sequence[Chunk], began: float, ended: float) -> None:
        """Text and statistics of a round were made between ``began`` and ``ended`` (seconds of the host's clock)."""
