"""OpenTelemetry spans of requests: how long each waited, was read, and was answered.

A request becomes a span ``dspark.request`` with the children ``queue``, ``prefill`` and ``decode``. It belongs to
the trace that the request's ``traceparent`` names (W3C Trace Context), else to one of its own. Spans are made when a
request has ended, from times that are known anyway: while it runs, tracing costs nothing.

Only the API package is needed here. Without an SDK that was set up, for example by ``opentelemetry-instrument``, it
does nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from dspark_runtime.errors import UsageError
from dspark_runtime.serving.events import Failed, Finished
from dspark_runtime.serving.handle import Handle
from dspark_serve.metrics import Metrics

if TYPE_CHECKING:
    from opentelemetry.trace import Span

_PHASES = ("queue", "prefill", "decode")


class Traced(Metrics):
    """Metrics, and spans of the requests.

    Raises:
        UsageError: OpenTelemetry is not installed.
    """

    def __init__(self) -> None:
        super().__init__()
        try:
            # opentelemetry: only where traces are wanted
            from opentelemetry import context, trace
            from opentelemetry.propagate import extract
        except ModuleNotFoundError as error:
            raise UsageError(
                "--traces needs OpenTelemetry; pip install opentelemetry-distro opentelemetry-exporter-otlp, and start "
                "the server with opentelemetry-instrument"
            ) from error
        self._trace, self._context, self._extract = trace, context, extract
        self._tracer = trace.get_tracer("dspark_serve")
        self._contexts: dict[int, Any] = {}

    @contextmanager
    def asking(self, headers: Mapping[str, str]) -> Iterator[None]:
        """Requests that are submitted meanwhile belong to the trace in ``headers``."""
        inside = self._trace.get_current_span().get_span_context().is_valid  # of a span that an instrumentation made
        token = None if inside else self._context.attach(self._extract(dict(headers)))
        try:
            yield
        finally:
            if token is not None:
                self._context.detach(token)

    def queued(self, handle: Handle) -> None:
        """Remember the trace."""
        super().queued(handle)
        self._contexts[handle.number] = self._context.get_current()

    def ended(self, handle: Handle, event: Finished | Failed) -> None:
        """Make its spans."""
        super().ended(handle, event)
        context = self._contexts.pop(handle.number, None)
        epoch = time.time() - time.monotonic()  # times of handles are of the monotonic clock
        span = self._tracer.start_span("dspark.request", context, start_time=_ns(handle.submitted + epoch))
        self._describe(span, handle, event)
        marks = [handle.submitted, handle.admitted, handle.first_token, handle.ended]
        within = self._trace.set_span_in_context(span)
        for name, began, ended in zip(_PHASES, marks[:-1], marks[1:], strict=True):
            if not began:
                break
            child = self._tracer.start_span(name, within, start_time=_ns(began + epoch))
            child.end(_ns((ended or handle.ended) + epoch))
            if not ended:
                break
        span.end(_ns(handle.ended + epoch))

    def _describe(self, span: Span, handle: Handle, event: Finished | Failed) -> None:
        """Counts and the outcome; never a prompt or a text."""
        span.set_attribute("dspark.prompt_tokens", len(handle.request.prompt))
        generation = event.generation
        if generation is not None:
            stats = generation.stats
            span.set_attribute("dspark.cached_tokens", generation.cached_tokens)
            span.set_attribute("dspark.generated_tokens", len(generation.tokens))
            span.set_attribute("dspark.rounds", stats.rounds)
            span.set_attribute("dspark.verified_tokens", stats.verified)
            span.set_attribute("dspark.accepted_tokens", stats.accepted)
            span.set_attribute("dspark.finish_reason", generation.finish_reason)
        if isinstance(event, Failed):
            span.set_status(self._trace.StatusCode.ERROR, type(event.error).__name__)


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
