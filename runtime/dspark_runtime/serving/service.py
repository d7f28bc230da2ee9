"""Serves requests of any number of threads with one decoding loop on a thread of its own.

========= ==============================================================================================
a request  is
========= ==============================================================================================
queued    accepted and without a row; the most urgent one is next (see :mod:`.waiting`)
running   given a row: its prompt is computed chunk by chunk, then it takes part in every round
ended     finished, cancelled, too late or failed; its sender was told so, once
========= ==============================================================================================

Between two steps the thread takes cancellations and passed deadlines, and gives free rows to waiting requests. While
some requests run and others have prompts to compute, prompts and rounds take turns, so that no text waits for more than
one turn (see :mod:`.chunks`). A row has room for the longest request there may be: what was admitted never runs out of
memory.

A step that fails ends the requests it was about, and no others. When the next one fails too, the service gives up:
every request is told, and none is taken any more.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Literal

from dspark_runtime.arguments import real, whole
from dspark_runtime.decoding.loop import DecodingLoop
from dspark_runtime.decoding.request import Limits, Request, make_request
from dspark_runtime.errors import (
    DeadlineExceeded,
    DsparkError,
    Overloaded,
    ServiceError,
    ServiceStopped,
    ServiceUnhealthy,
    UsageError,
)
from dspark_runtime.serving.chunks import FEWEST, ChunkSize
from dspark_runtime.serving.events import Failed, Finished, Listener, Started, Tokens
from dspark_runtime.serving.handle import Counts, Handle, Health, ServiceStats
from dspark_runtime.serving.observer import ServiceObserver
from dspark_runtime.serving.options import MOST_PRIORITY, ServiceOptions
from dspark_runtime.serving.waiting import WaitingQueue
from dspark_runtime.speculation.sampling import SamplingParams

HEARTBEAT_SECONDS = 1.0
"""The engine's thread shows that it lives at least this often while nothing is to be done."""

_log = logging.getLogger(__name__)
_clock = time.monotonic


class Service:
    """See the module's text; made by :meth:`Bundle.serve`. A context manager that closes itself.

    Args:
        open_loop: makes a loop with its drafters; called again after a pass has failed.
        options: sizes and rules.
        limits: vocabulary, and the most tokens of a request.
        eos: token ids that end a text.
        fixed_chunks: prompts are cut alike whatever else runs, for texts to depend on nothing else.
        observer: hears what happens.
        threaded: start the engine's thread; otherwise the caller calls :meth:`turn`, on a thread of its own.

    Raises:
        CapacityError: no memory for the caches.
    """

    def __init__(
        self,
        open_loop: Callable[[], DecodingLoop],
        options: ServiceOptions,
        limits: Limits,
        eos: Sequence[int] = (),
        fixed_chunks: bool = False,
        observer: ServiceObserver | None = None,
        threaded: bool = True,
    ) -> None:
        self.options, self.limits = options, limits
        self.observer = observer or ServiceObserver()
        self.counts = Counts()
        self._eos = tuple(eos)
        self._open_loop = open_loop
        self._loop = open_loop()
        self.drafters = tuple(drafter.name for drafter in self._loop.drafters)
        self._chunks = ChunkSize(options.chunk, self._loop.options.prefill_chunk, options.prefill_share, fixed_chunks)
        self._changed = threading.Condition()  # guards everything below that other threads touch
        self._health: Health = "ready"
        self._queue: WaitingQueue[Handle] = WaitingQueue()
        self._cancelled: deque[Handle] = deque()
        self._deadlines: list[tuple[float, int, Handle]] = []
        self._closing: DsparkError | None = None
        self._numbers = itertools.count()
        self._flushes: list[Callable[[], None]] = []
        self._running: dict[int, Handle] = {}  # by sequence index; of the engine's thread alone from here on
        self._round_next, self._turn_left = False, 0
        self._failures = 0
        self._beat = _clock()
        self._thread: threading.Thread | None = None
        if threaded:
            self._thread = threading.Thread(target=self._run, name="dspark-engine", daemon=True)
            self._thread.start()

    # Of any thread -------------------------------------------------------------------------------------------------

    def request(
        self,
        prompt: Sequence[int],
        params: SamplingParams | None = None,
        *,
        max_new_tokens: int | None = None,
        seed: int = 0,
        stop: str | Sequence[str] | None = (),
        ignore_eos: bool = False,
        choice: int = 0,
        scope: str = "",
        speculate: Literal["auto", "off"] | bool = "auto",
    ) -> Request:
        """A checked request; arguments as for :meth:`Bundle.generate`.

        ``choice`` numbers several texts for one prompt and seed. Context is reused between requests of one ``scope``
        only. ``speculate`` ``off`` (or False): nothing is drafted for this request; ``auto``: what the service's
        drafters find. The text depends on nothing but the other arguments.

        Raises:
            UsageError: an argument outside its range.
            CapacityError: prompt and text are longer than the service's capacity.
        """
        if not isinstance(speculate, bool) and speculate not in ("auto", "off"):
            raise UsageError(f"speculate={speculate!r}: a request is served with 'auto' or 'off'")
        return make_request(
            prompt,
            self.limits,
            max_new_tokens=max_new_tokens,
            params=params,
            seed=seed,
            stop=stop,
            eos=() if ignore_eos else self._eos,
            occurrence=choice,
            scope=scope,
            speculate=speculate not in (False, "off"),
        )

    def submit(
        self,
        request: Request,
        listener: Listener | None = None,
        *,
        deadline: float | None = None,
        priority: int = 0,
    ) -> Handle:
        """Let a request join.

        Args:
            request: of :meth:`request`.
            listener: is called with every event, on the engine's thread, in order; it must not block. None if only
                :meth:`Handle.result` is wanted.
            deadline: seconds from now after which the text is not wanted any more.
            priority: 0 to 9; higher goes first, and waiting ten seconds counts as one.

        Raises:
            Overloaded: as many requests wait as may.
            ServiceStopped: the service takes no more requests.
            ServiceUnhealthy: its engine has failed.
            UsageError: a deadline or a priority outside its range.
        """
        priority = whole("priority", priority, 0, MOST_PRIORITY)
        seconds = None if deadline is None else real(deadline)
        if deadline is not None and (seconds is None or not 0 < seconds < 1e9):
            raise UsageError(f"deadline={deadline!r}: give seconds above 0, or None")
        handle = Handle(request, listener, next(self._numbers), self._cancel)
        handle.priority, handle.submitted = priority, _clock()
        with self._changed:
            self._refuse_if_not_ready()
            if self._waiting() >= self.options.queue + self._free():
                self.counts.refused += 1
                self.observer.refused("overloaded")
                raise Overloaded(
                    f"{self._waiting()} requests wait and {self.options.queue} may; try again later, or give the "
                    "service a longer queue or more rows"
                )
            if seconds is not None:
                handle.deadline = handle.submitted + seconds
                heapq.heappush(self._deadlines, (handle.deadline, handle.number, handle))
            self.counts.accepted += 1
            self.observer.queued(handle)
            self._queue.push(handle)
            self._changed.notify()
        return handle

    @property
    def health(self) -> Health:
        """``ready``; ``draining`` while it ends; ``stopped`` after that; ``unhealthy`` if its engine has failed."""
        return self._health

    @property
    def ledger_ms(self) -> float:
        """What :attr:`Schedule.lost_ms` of the running loop says."""
        return self._loop.schedule.lost_ms

    @property
    def heartbeat(self) -> float:
        """Seconds since the engine's thread last began a step or looked for one."""
        return _clock() - self._beat

    def stats(self) -> ServiceStats:
        """What the service is doing now."""
        with self._changed:
            return ServiceStats(
                self._health,
                self.options.rows,
                self.limits.positions,
                len(self._running),
                len(self._queue),
                self.heartbeat,
                Counts(**(vars(self.counts) | {"ended": dict(self.counts.ended)})),
            )

    def after_step(self, flush: Callable[[], None]) -> None:
        """Call ``flush`` on the engine's thread whenever the events of a step have been given to their listeners."""
        with self._changed:
            self._flushes.append(flush)

    def drain(self, timeout: float | None = None) -> bool:
        """Take no more requests and wait for those there are; whether all ended within ``timeout`` seconds."""
        with self._changed:
            if self._health == "ready":
                self._health = "draining"
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._idle() or self._health in ("stopped", "unhealthy"), timeout)
            return self._idle()

    def close(self, timeout: float = 0.0) -> None:
        """:meth:`drain`, then cancel what is left after ``timeout`` seconds, and stop."""
        self.drain(timeout)
        with self._changed:
            self._closing = ServiceStopped("the service was closed before the text ended")
            self._changed.notify_all()
        if self._thread is not None and threading.current_thread() is not self._thread:
            self._thread.join()

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _refuse_if_not_ready(self) -> None:
        if self._health == "ready":
            return
        self.counts.refused += 1
        if self._health == "unhealthy":
            self.observer.refused("unhealthy")
            raise ServiceUnhealthy("the service's engine has failed and takes no more requests; start it again")
        self.observer.refused("stopped")
        raise ServiceStopped(f"the service is {self._health} and takes no more requests")

    def _cancel(self, handle: Handle) -> None:
        with self._changed:
            self._cancelled.append(handle)
            self._changed.notify()

    def _waiting(self) -> int:
        return len(self._queue)

    def _free(self) -> int:
        return self.options.rows - len(self._running)

    def _idle(self) -> bool:
        return not self._running and not len(self._queue)

    # Of the engine's thread ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self.turn(HEARTBEAT_SECONDS):
                pass
        except BaseException as error:
            _log.exception("the engine's thread ends")
            self._give_up(ServiceUnhealthy(f"the engine's thread ended: {error!r}"))
        finally:
            with suppress(Exception):
                self._loop.close()

    def turn(self, patience: float = 0.0) -> bool:
        """Take what other threads want, then run one step; whether there will be another turn.

        Where there is nothing to do it waits for something, at most ``patience`` seconds.
        """
        with self._changed:
            self._beat = _clock()
            if patience and not self._urgent():
                self._changed.wait(min(patience, self._until_deadline()))
            closing = self._closing
            cancelled, self._cancelled = self._cancelled, deque()
            late = self._too_late()
        if closing is not None:
            self._end_all(closing)
            with self._changed:
                self._health = "stopped" if self._health != "unhealthy" else "unhealthy"
                self._changed.notify_all()
            return False
        self._drop(cancelled, None)
        self._drop(late, DeadlineExceeded("the deadline has passed"))
        self._admit()
        if self._loop.busy:
            self._step()
        self._flush()
        return self._health != "unhealthy"

    def _urgent(self) -> bool:
        """Whether there is something to do now."""
        return bool(self._loop.busy or self._cancelled or self._closing or (len(self._queue) and self._loop.free))

    def _until_deadline(self) -> float:
        return max(self._deadlines[0][0] - _clock(), 0.0) if self._deadlines else HEARTBEAT_SECONDS

    def _too_late(self) -> list[Handle]:
        late, now = [], _clock()
        while self._deadlines and self._deadlines[0][0] <= now:
            handle = heapq.heappop(self._deadlines)[2]
            if handle.outcome is None:
                late.append(handle)
        if len(self._deadlines) > 2 * (len(self._running) + len(self._queue)) + 64:  # of requests that have ended
            self._deadlines = [entry for entry in self._deadlines if entry[2].outcome is None]
            heapq.heapify(self._deadlines)
        return late

    def _drop(self, handles: Iterable[Handle], error: DsparkError | None) -> None:
        """End requests before their text ends: cancelled, or with an error."""
        handles = [handle for handle in handles if handle.outcome is None]
        if not handles:
            return
        with self._changed:
            self._queue.remove({id(handle) for handle in handles})
        for handle in handles:
            sequence = handle.sequence
            if sequence is None:  # it never had a row
                sequence = self._loop.not_admitted(handle.request)
            elif sequence.finished:  # by itself, just now: its last tokens are on their way
                continue
            else:
                chunk = self._loop.cancel(sequence)
                if chunk.text:
                    handle.tell(Tokens(chunk))
            generation = sequence.generation()
            self._end(handle, Finished(generation) if error is None else Failed(error, generation))

    def _admit(self) -> None:
        while self._loop.free:
            with self._changed:
                handle = next(self._queue, None)
            if handle is None:
                return
            handle.admitted = _clock()
            handle.sequence = self._loop.admit(handle.request)
            with self._changed:
                self._running[handle.sequence.index] = handle
            self.observer.admitted(handle)
            handle.tell(Started(handle.admitted - handle.submitted))

    def _step(self) -> None:
        loop, began = self._loop, _clock()
        most = self._turn_left or self._chunks.tokens(loop.running, loop.prompts)
        try:
            chunks = loop.step(rounds_first=self._round_next, chunk=most)
        except DsparkError as error:
            self._recover(error)
            return
        seconds = _clock() - began
        # What a prompt that ends leaves of its turn is for the next one.
        self._turn_left = most - loop.prompt_tokens if loop.prompt_tokens and not self._chunks.fixed else 0
        if self._turn_left < FEWEST or not loop.prompts:
            self._turn_left = 0
        self._round_next = loop.prompt_tokens > 0 and not self._turn_left
        self._failures = 0
        self._chunks.observe(loop.prompt_tokens, seconds)
        self.observer.stepped(loop.prompt_tokens > 0, seconds)
        if loop.prompt_tokens:
            self.counts.chunks += 1
        else:
            self.counts.rounds += 1
        for chunk in chunks:
            handle = self._running.get(chunk.index)
            if handle is None:  # cancelled while its last tokens were on their way
                continue
            if not handle.first_token:
                handle.first_token = _clock()
                self.observer.first_token(handle)
            if chunk.tokens or chunk.text:
                handle.tell(Tokens(chunk))
            if chunk.finish_reason is not None:
                assert handle.sequence is not None
                self._end(handle, Finished(handle.sequence.generation()))

    def _end(self, handle: Handle, event: Finished | Failed) -> None:
        """The request is over; its sender is told."""
        sequence = handle.sequence
        handle.ended = _clock()
        with self._changed:
            handle.outcome = event
            if sequence is not None:
                self._running.pop(sequence.index, None)
            reason = _reason(event)
            self.counts.ended[reason] = self.counts.ended.get(reason, 0) + 1
            if sequence is not None:
                self.counts.prompt_tokens += len(handle.request.prompt)
                self.counts.cached_tokens += sequence.cached
                self.counts.generated_tokens += sequence.emitted
            self._changed.notify_all()
        self.observer.ended(handle, event)
        handle.tell(event)

    def _flush(self) -> None:
        for flush in list(self._flushes):
            flush()

    # When something fails ------------------------------------------------------------------------------------------

    def _recover(self, error: DsparkError) -> None:
        """A step failed: end the requests it was about, and go on with the others in a sound loop."""
        loop = self._loop
        _log.error("a step failed: %s", error)
        failed = [self._running[s.index] for s in loop.failing if s.index in self._running]
        for handle in failed:
            assert handle.sequence is not None
            if not handle.sequence.finished:
                loop.cancel(handle.sequence)
            self._end(handle, Failed(error, handle.sequence.generation()))
        if loop.sound:  # the pass went through: the model's numbers for these requests were the trouble
            return
        self._failures += 1
        if self._failures > 1:
            self._give_up(ServiceUnhealthy(f"two steps failed in a row, the last one with: {error}"))
            return
        if loop.running == 0:  # nothing is lost with the cache: prompts are computed again
            self._reopen()

    def _reopen(self) -> None:
        again = sorted(self._running.values(), key=lambda handle: handle.number)
        with suppress(DsparkError):
            self._loop.close()
        try:
            self._loop = self._open_loop()
        except DsparkError as error:
            self._give_up(ServiceUnhealthy(f"the engine failed and could not be opened again: {error}"))
            return
        with self._changed:
            self._running.clear()
            for handle in again:
                handle.sequence = self._loop.admit(handle.request)
                self._running[handle.sequence.index] = handle

    def _give_up(self, error: DsparkError) -> None:
        with self._changed:
            self._health = "unhealthy"
        self._end_all(error)
        self._flush()
        with self._changed:
            self._changed.notify_all()

    def _end_all(self, error: DsparkError) -> None:
        """Every request there is ends with ``error``."""
        with self._changed:
            handles = [*self._running.values(), *self._queue.waiting()]
        for handle in handles:
            if handle.sequence is not None and not handle.sequence.finished:
                with suppress(Exception):
                    self._loop.cancel(handle.sequence)
        with self._changed:
            self._queue.remove({id(handle) for handle in handles})
        for handle in handles:
            generation = handle.sequence.generation() if handle.sequence and handle.sequence.finished else None
            self._end(handle, Failed(error, generation))
        self._flush()


def _reason(event: Finished | Failed) -> str:
    """Why a request ended, as one word."""
    if isinstance(event, Finished):
        return event.generation.finish_reason
    if isinstance(event.error, DeadlineExceeded):
        return "deadline"
    return "stopped" if isinstance(event.error, ServiceError) else "failed"
