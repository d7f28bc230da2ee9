"""From the engine's thread to asyncio: one hand-over a step for the events of all requests.

The service's listeners only append to a list; when a step's events have all been given out, ``flush`` hands the list
to the event loop with a single ``call_soon_threadsafe``, which spreads them over the channels of the requests.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from dspark_runtime.decoding.request import Request
from dspark_runtime.errors import DsparkError
from dspark_runtime.serving.events import Event, Failed, Finished
from dspark_runtime.serving.handle import Handle
from dspark_runtime.serving.service import Service
from dspark_serve.errors import CLIENT_GONE, ApiError, from_runtime


@dataclass(frozen=True)
class StreamLimits:
    """``events`` may wait for one client; a stream waits ``patience`` seconds for its first before it answers 200."""

    events: int = 1024
    patience: float = 5.0


class Item(NamedTuple):
    """An event of one of a channel's requests, which are numbered from 0."""

    choice: int
    event: Event


class Channel:
    """The events of one HTTP request, which may be of several requests of the service. For the event loop's thread.

    A client that reads too slowly is given up once ``limits.events`` events wait for it: its requests are cancelled,
    and :meth:`read` raises when it comes to the end.
    """

    def __init__(self, limits: StreamLimits) -> None:
        self.handles: list[Handle] = []
        self.slow = self.gone = False
        self._limits = limits
        self._items: deque[Item] = deque()
        self._ready = asyncio.Event()
        self._open = 0

    @property
    def done(self) -> bool:
        """Whether every request has ended and its last event was read."""
        return not self._open and not self._items

    def attach(self, handle: Handle) -> None:
        """One more request."""
        self.handles.append(handle)
        self._open += 1

    def put(self, item: Item) -> None:
        """An event came."""
        if isinstance(item.event, Finished | Failed):
            self._open -= 1
        elif self.slow:
            return
        self._items.append(item)
        if len(self._items) > self._limits.events and not self.slow:
            self.slow = True
            self.cancel()
        self._ready.set()

    async def wait(self) -> None:
        """Wait until :meth:`read` has something, or nothing will come."""
        if not self._items and self._open and not self.gone:
            self._ready.clear()
            await self._ready.wait()

    async def begun(self) -> None:
        """Wait a while for the first event, so that an early failure has a status of its own.

        Raises:
            ApiError: a request failed before it gave anything.
        """
        with suppress(TimeoutError):
            await asyncio.wait_for(self.wait(), self._limits.patience)
        if self._items and isinstance(self._items[0].event, Failed):
            self.cancel()
            raise from_runtime(self._items[0].event.error)

    async def read(self) -> list[Item]:
        """All events that wait, at least one; empty once :attr:`done`.

        Raises:
            ApiError: a request failed, or the client was too slow or has gone. The other requests are cancelled.
        """
        await self.wait()
        if self.gone:
            raise ApiError(CLIENT_GONE, "the client went away")
        items = list(self._items)
        self._items.clear()
        for place, item in enumerate(items):
            if isinstance(item.event, Failed):
                self.cancel()
                if place:  # what came before it goes out first
                    self._items.extend(items[place:])
                    return items[:place]
                raise from_runtime(item.event.error)
        if not items and self.slow:
            raise ApiError(408, f"the client left {self._limits.events} events unread", code="slow_client")
        return items

    def abandon(self) -> None:
        """The client has gone."""
        self.gone = True
        self.cancel()
        self._ready.set()

    def cancel(self) -> None:
        """End the requests that have not ended; may be called any number of times."""
        for handle in self.handles:
            if handle.outcome is None:
                handle.cancel()


class Bridge:
    """Submits requests to a service and brings their events to the running event loop.

    Args:
        service: its ``after_step`` is taken.
        limits: of every channel.
    """

    def __init__(self, service: Service, limits: StreamLimits | None = None) -> None:
        self.service = service
        self._limits = limits or StreamLimits()
        self._loop = asyncio.get_running_loop()
        self._events: list[tuple[Channel, Item]] = []  # of the engine's thread
        service.after_step(self._flush)

    def submit(
        self, requests: Sequence[Request], *, parts: bool = True, deadline: float | None = None, priority: int = 0
    ) -> Channel:
        """All of ``requests``, or none; without ``parts`` the channel has their ends only.

        Raises:
            DsparkError: as for :meth:`Service.submit`.
        """
        channel = Channel(self._limits)
        for choice, request in enumerate(requests):
            listener = partial(self._heard if parts else self._heard_end, channel, choice)
            try:
                channel.attach(self.service.submit(request, listener, deadline=deadline, priority=priority))
            except DsparkError:
                channel.cancel()
                raise
        return channel

    def _heard(self, channel: Channel, choice: int, event: Event) -> None:
        self._events.append((channel, Item(choice, event)))

    def _heard_end(self, channel: Channel, choice: int, event: Event) -> None:
        if isinstance(event, Finished | Failed):  # nobody is woken for what will be in the whole text
            self._heard(channel, choice, event)

    def _flush(self) -> None:
        if not self._events:
            return
        events, self._events = self._events, []
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._deliver, events)

    @staticmethod
    def _deliver(events: Sequence[tuple[Channel, Item]]) -> None:
        for channel, item in events:
            channel.put(item)
