"""Prometheus metrics of a service and of the answers over it. Names are stable; all begin with ``dspark_``."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from dspark_runtime.decoding.round import Accepted, Flight
from dspark_runtime.serving.events import Failed, Finished
from dspark_runtime.serving.handle import Handle
from dspark_runtime.serving.observer import ServiceObserver
from dspark_runtime.serving.service import Service

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_LENGTHS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32)


class Metrics(ServiceObserver):
    """Counts what one service does; :meth:`watch` it before it is asked for :meth:`text`."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._requests = Counter(
            "dspark_requests", "HTTP requests that were answered.", ["route", "status", "reason"], registry=registry
        )
        self._speculation = Counter(
            "dspark_speculation", "HTTP requests, by whether they are drafted for.", ["state"], registry=registry
        )
        self._refused = Counter("dspark_refused", "Requests the service did not take.", ["reason"], registry=registry)
        self._tokens = Counter("dspark_tokens", "Tokens of ended requests.", ["kind"], registry=registry)
        self._queue_s = self._histogram("queue_seconds", "From arrival to a row of the cache.", _SECONDS)
        self._first_s = self._histogram("time_to_first_token_seconds", "From arrival to the first token.", _SECONDS)
        self._between_s = self._histogram(
            "inter_token_seconds", "Between the tokens of two rounds of a request, over the number of tokens.", _SECONDS
        )
        self._request_s = self._histogram("request_seconds", "From arrival to the end.", _SECONDS)
        self._rounds = Counter("dspark_rounds", "Passes over all running requests.", ["kind"], registry=registry)
        self._phases = Histogram(
            "dspark_round_seconds", "Parts of a step.", ["phase"], buckets=_SECONDS, registry=registry
        )
        self._drafted = Counter("dspark_drafted", "Tokens that were proposed.", ["drafter"], registry=registry)
        self._verified = Counter(
            "dspark_verified", "Proposed tokens that were verified.", ["drafter"], registry=registry
        )
        self._accepted = Counter(
            "dspark_accepted", "Verified tokens that were accepted.", ["drafter"], registry=registry
        )
        self._length = self._histogram("accepted_length", "Tokens a request got in a round.", _LENGTHS)
        self._rows = self._histogram("rows_per_round", "Rows of a pass, padding included.", _ROWS)
        self._lookups = Counter("dspark_prefix_lookups", "Prompts that ended.", registry=registry)
        self._hits = Counter("dspark_prefix_hits", "Of those, prompts with reused context.", registry=registry)
        self._info = Gauge("dspark_build_info", "What is served.", ["version", "model", "precision"], registry=registry)
        self._last: dict[int, float] = {}
        self.prefilling = 0
        self.slots = 0

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"dspark_{name}", text, buckets=buckets, registry=self.registry)

    def watch(self, service: Service, version: str, model: str, precision: str) -> None:
        """Read the state of ``service`` whenever metrics are asked for."""
        self._info.labels(version, model, precision).set(1)
        self.registry.register(_State(service, self))

    def text(self) -> bytes:
        """Everything, in Prometheus's text format."""
        return generate_latest(self.registry)

    def answered(self, route: str, status: int, reason: str) -> None:
        """An HTTP request was answered, or given up."""
        self._requests.labels(route, str(status), reason).inc()

    def asking(self, headers: Mapping[str, str]) -> AbstractContextManager[None]:
        """Around the submission of what an HTTP request with these headers asks for."""
        return nullcontext()

    def speculated(self, state: str) -> None:
        """A request was taken that is drafted for, in part or not at all."""
        self._speculation.labels(state).inc()

    # Of the service ------------------------------------------------------------------------------------------------

    def refused(self, reason: str) -> None:
        """A request was refused."""
        self._refused.labels(reason).inc()

    def admitted(self, handle: Handle) -> None:
        """A request was given a row."""
        self.prefilling += 1
        self._queue_s.observe(handle.admitted - handle.submitted)

    def first_token(self, handle: Handle) -> None:
        """The prompt is computed."""
        self.prefilling -= 1
        self._first_s.observe(handle.first_token - handle.submitted)
        if handle.sequence is not None:
            self._last[handle.sequence.index] = time.perf_counter()

    def ended(self, handle: Handle, event: Finished | Failed) -> None:
        """A request has ended."""
        self._request_s.observe(handle.ended - handle.submitted)
        if handle.admitted and not handle.first_token:
            self.prefilling -= 1
        if handle.sequence is None:
            return
        self._last.pop(handle.sequence.index, None)
        generation = event.generation
        if generation is None:
            return
        self._tokens.labels("prompt").inc(generation.prompt_tokens)
        self._tokens.labels("cached").inc(generation.cached_tokens)
        self._tokens.labels("generated").inc(len(generation.tokens))
        self._lookups.inc()
        self._hits.inc(generation.cached_tokens > 0)
        for name, counts in generation.stats.per_drafter.items():
            self._verified.labels(name).inc(counts.drafted)
            self._accepted.labels(name).inc(counts.accepted)

    def stepped(self, prompt: bool, seconds: float) -> None:
        """A chunk of a prompt, or a round."""
        if prompt:
            self._phases.labels("prefill").observe(seconds)

    # Of the loop ---------------------------------------------------------------------------------------------------

    def committed(self, accepted: Accepted, flight: Flight) -> None:
        """A round gave one request tokens."""
        now, index, count = time.perf_counter(), accepted.sequence.index, len(accepted.tokens)
        self._length.observe(count)
        if count and (last := self._last.get(index)):
            self._between_s.observe((now - last) / count)
        self._last[index] = now

    def finished(self, flight: Flight) -> None:
        """A round is over."""
        speculative = any(len(tree) > 1 for tree in flight.trees)
        self._rounds.labels("speculative" if speculative else "plain").inc()
        batch, rows = flight.buffers.input_ids.shape
        self._rows.observe(batch * rows)
        self._phases.labels("draft").observe(flight.drafted - flight.began)
        self._phases.labels("verify").observe(flight.verified - flight.filled)
        self._phases.labels("host").observe(flight.filled - flight.drafted + flight.committed - flight.verified)
        self.slots = sum(len(sequence.tokens) for sequence in flight.sequences)
        for proposal in flight.proposals:
            for part in proposal.parts:
                self._drafted.labels(part.drafter.name).inc(len(part.draft.tree) - 1)


class _State(Collector):
    """Gauges of what a service is doing."""

    def __init__(self, service: Service, metrics: Metrics) -> None:
        self._service, self._metrics = service, metrics

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Read them."""
        stats = self._service.stats()
        slots = self._metrics.slots if stats.running else 0
        gauges = {
            "running": ("Requests that have a row.", stats.running),
            "waiting": ("Requests that wait for a row.", stats.waiting),
            "prefilling": ("Requests whose prompt is being computed.", self._metrics.prefilling),
            "rows": ("Rows of the cache.", stats.rows),
            "rows_used": ("Rows that requests have.", stats.running),
            "slots": ("Tokens the cache has room for.", stats.rows * stats.capacity),
            "slots_used": ("Tokens of requests that decode, at the end of the last round.", slots),
            "ready": ("1 while requests are taken.", stats.health == "ready"),
            "ledger_ms": ("Time lost to drafts that did not pay, less what others won.", self._service.ledger_ms),
            "engine_heartbeat_seconds": ("Since the engine's thread last showed life.", stats.heartbeat),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(f"dspark_{name}", text, value=float(value))
