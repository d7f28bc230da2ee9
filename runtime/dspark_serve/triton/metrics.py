"""Figures of a service among Triton's own metrics, whose counters call cancelled and refused requests a success."""

from __future__ import annotations

from typing import Any

from dspark_runtime.serving.service import Service

_COUNTERS = {
    "dspark_requests_total": "Requests that ended, by reason.",
    "dspark_refused_total": "Requests the service did not take.",
    "dspark_tokens_total": "Tokens of ended requests.",
    "dspark_rounds_total": "Passes over all running requests.",
}
_GAUGES = {
    "dspark_running": "Requests that have a row.",
    "dspark_waiting": "Requests that wait for a row.",
    "dspark_rows": "Rows of the cache.",
    "dspark_ready": "1 while requests are taken.",
    "dspark_engine_heartbeat_seconds": "Since the engine's thread last showed life.",
}


class Metrics:
    """Copies what a service counts into families of Triton; call it now and then, on one thread."""

    def __init__(self, pb_utils: Any, service: Service, model: str) -> None:
        family = pb_utils.MetricFamily
        self._service, self._model = service, model
        self._counters = {n: family(name=n, description=d, kind=family.COUNTER) for n, d in _COUNTERS.items()}
        self._gauges = {n: family(name=n, description=d, kind=family.GAUGE) for n, d in _GAUGES.items()}
        self._metrics: dict[tuple[str, str], Any] = {}
        self._counted: dict[tuple[str, str], int] = {}

    def __call__(self) -> None:
        """Bring all figures up to date."""
        stats = self._service.stats()
        counts = stats.counts
        for reason, number in counts.ended.items():
            self._count("dspark_requests_total", number, reason=reason)
        self._count("dspark_refused_total", counts.refused)
        self._count("dspark_rounds_total", counts.rounds)
        for kind in ("prompt", "cached", "generated"):
            self._count("dspark_tokens_total", getattr(counts, f"{kind}_tokens"), kind=kind)
        self._gauge("dspark_running", stats.running)
        self._gauge("dspark_waiting", stats.waiting)
        self._gauge("dspark_rows", stats.rows)
        self._gauge("dspark_ready", stats.health == "ready")
        self._gauge("dspark_engine_heartbeat_seconds", stats.heartbeat)

    def _count(self, name: str, number: int, **labels: str) -> None:
        key = (name, "".join(labels.values()))
        metric = self._metric(self._counters[name], key, labels)
        if number > self._counted.get(key, 0):
            metric.increment(number - self._counted.get(key, 0))
            self._counted[key] = number

    def _gauge(self, name: str, value: float) -> None:
        self._metric(self._gauges[name], (name, ""), {}).set(float(value))

    def _metric(self, family: Any, key: tuple[str, str], labels: dict[str, str]) -> Any:
        if key not in self._metrics:
            self._metrics[key] = family.Metric(labels=labels | {"model": self._model})
        return self._metrics[key]
