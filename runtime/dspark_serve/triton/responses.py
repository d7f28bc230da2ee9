"""Sends what a service says to Triton's clients, on one thread for all requests.

Sending waits for the server's process, so the engine's thread only leaves its events here. What has come meanwhile for
one request goes out as one response: a slow server gets fewer and longer responses, and nothing piles up.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dspark_runtime.errors import DeadlineExceeded, Overloaded, ServiceStopped, UsageError
from dspark_runtime.serving.events import Event, Failed, Finished, Started, Tokens
from dspark_runtime.serving.handle import Handle
from dspark_serve.triton.asking import Ask

WATCH_SECONDS = 0.02
"""Clients of running requests that went away are noticed after this time, even where no text comes."""
_WATCH_WAITING = 10  # times as long for requests that have not begun
_IDLE_SECONDS = 1.0
_REPORT_SECONDS = 0.25
_NOTHING: Mapping[str, Any] = {}

_log = logging.getLogger(__name__)
_clock = time.monotonic


def triton_error(pb_utils: Any, error: Exception) -> Any:
    """An error as Triton's clients get it: its type, then its message, for streams lose the code."""
    codes = pb_utils.TritonError
    if isinstance(error, UsageError):
        code = codes.INVALID_ARG
    elif isinstance(error, Overloaded | ServiceStopped | DeadlineExceeded):
        code = codes.UNAVAILABLE
    else:
        code = codes.INTERNAL
    return pb_utils.TritonError(f"{type(error).__name__}: {error}", code)


@dataclass
class Conversation:
    """One inference request that was accepted. ``text``, ``tokens`` and ``end`` are what is still to be sent."""

    sender: Any
    ask: Ask
    handle: Handle | None = None
    text: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    end: Finished | Failed | None = None
    started: bool = False
    watched: float = 0.0


class Outbox:
    """Takes events of any number of requests and sends the responses.

    Args:
        pb_utils: the module ``triton_python_backend_utils``, which only Triton's own process has.
        report: is called now and then, on the sending thread.
    """

    def __init__(self, pb_utils: Any, report: Callable[[], None]) -> None:
        self._pb, self._report = pb_utils, report
        self._changed = threading.Condition()
        self._open: dict[int, Conversation] = {}
        self._ready: dict[int, Conversation] = {}
        self._closing = False
        self._reported = 0.0
        self._complained = False
        self._thread = threading.Thread(target=self._run, name="dspark-responses", daemon=True)
        self._thread.start()

    def accept(self, sender: Any, ask: Ask, submit: Callable[[Callable[[Event], None]], Handle]) -> None:
        """Let a request join by ``submit``, which takes its listener, and answer it through ``sender``.

        Raises:
            DsparkError: it was not accepted.
        """
        conversation = Conversation(sender, ask)
        with self._changed:  # before its first event, which may be its last
            self._open[id(conversation)] = conversation
        try:
            conversation.handle = submit(lambda event: self._hear(conversation, event))
        except BaseException:
            with self._changed:
                del self._open[id(conversation)]
            raise

    def refuse(self, sender: Any, error: Exception) -> None:
        """Answer a request that was not accepted; from any thread."""
        self._send(sender, error=triton_error(self._pb, error), final=True)

    def close(self) -> None:
        """Send what there is and stop; every request must have ended."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _hear(self, conversation: Conversation, event: Event) -> None:
        """On the engine's thread."""
        with self._changed:
            if isinstance(event, Started):
                conversation.started = True
                return
            if isinstance(event, Tokens):
                if not conversation.ask.stream:
                    return
                conversation.text.append(event.chunk.text)
                conversation.tokens += event.chunk.tokens
            else:
                conversation.end = event
            self._ready[id(conversation)] = conversation
            self._changed.notify()

    # Of the sending thread -------------------------------------------------------------------------------------------

    def _run(self) -> None:
        unreported = False
        while True:
            with self._changed:
                if not self._ready and not self._closing:
                    idle = _REPORT_SECONDS if unreported else _IDLE_SECONDS
                    self._changed.wait(WATCH_SECONDS if self._open else idle)
                ready, self._ready = list(self._ready.items()), {}
                news = [(key, conversation, *self._take(conversation)) for key, conversation in ready]
                running = list(self._open.values())
                closing = self._closing
            for key, conversation, text, tokens, end in news:
                try:
                    self._answer(conversation, text, tokens, end)
                except Exception:  # the server's process refuses it: nobody is there to be told
                    _log.exception("a response could not be sent; its request is cancelled")
                    if conversation.handle is not None:
                        conversation.handle.cancel()
                if end is not None:
                    with self._changed:
                        self._open.pop(key, None)
            for conversation in running:
                self._watch(conversation)
            unreported = unreported or bool(news)
            if closing or _clock() - self._reported >= _REPORT_SECONDS:
                self._try_report()
                unreported = False
            if closing and not news:
                return

    def _try_report(self) -> None:
        self._reported = _clock()
        try:
            self._report()
        except Exception:  # figures are not worth a thread
            if not self._complained:
                _log.exception("metrics cannot be brought up to date")
            self._complained = True

    @staticmethod
    def _take(conversation: Conversation) -> tuple[str, list[int], Finished | Failed | None]:
        text, tokens = "".join(conversation.text), conversation.tokens
        conversation.text, conversation.tokens = [], []
        return text, tokens, conversation.end

    def _watch(self, conversation: Conversation) -> None:
        now = _clock()
        pause = WATCH_SECONDS if conversation.started else _WATCH_WAITING * WATCH_SECONDS
        if conversation.end is None and conversation.handle is not None and now - conversation.watched >= pause:
            conversation.watched = now
            if conversation.sender.is_cancelled():
                conversation.handle.cancel()

    def _answer(self, conversation: Conversation, text: str, tokens: list[int], end: Finished | Failed | None) -> None:
        send, ask, sender = self._send, conversation.ask, conversation.sender
        if end is None:
            send(sender, {"text_output": text, "token_ids": tokens})
        elif isinstance(end, Failed):
            if ask.stream and (text or tokens):
                send(sender, {"text_output": text, "token_ids": tokens})
            send(sender, error=triton_error(self._pb, end.error), final=True)
        elif end.generation.finish_reason == "cancelled":
            message = "Cancelled: the client cancelled the request"
            send(sender, error=self._pb.TritonError(message, self._pb.TritonError.CANCELLED), final=True)
        else:
            made = end.generation
            outputs: dict[str, Any] = {
                "text_output": text if ask.stream else made.text,
                "token_ids": tokens if ask.stream else made.tokens,
                "finish_reason": made.finish_reason,
            }
            counts = {"num_input_tokens": made.prompt_tokens, "num_output_tokens": len(made.tokens)}
            wanted = zip(counts.items(), ask.counts, strict=True)
            send(sender, outputs | {name: count for (name, count), want in wanted if want}, final=True)

    def _send(
        self, sender: Any, outputs: Mapping[str, Any] | None = None, error: Any = None, final: bool = False
    ) -> None:
        pb_utils = self._pb
        tensors = [pb_utils.Tensor(name, _array(value)) for name, value in (outputs or {}).items()]
        response = pb_utils.InferenceResponse(output_tensors=tensors, error=error)
        sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if final else 0)


def _array(value: str | int | list[int]) -> Any:
    """A value with its batch dimension."""
    if isinstance(value, str):
        return np.array([[value.encode()]], dtype=object)
    return np.array([value if isinstance(value, list) else [value]], dtype=np.int32)
