"""Spans of requests, in OpenTelemetry's own SDK."""

from __future__ import annotations

import sys
from typing import Any

import httpx
import pytest

from dspark_runtime import Bundle, ServiceOptions
from dspark_runtime.errors import UsageError
from dspark_serve.tracing import Traced
from tests.serve.running import NAME, running

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
ASKED: Any = {"model": NAME, "prompt": "once upon", "max_tokens": 5, "temperature": 0, "ignore_eos": True}


def test_a_request_is_a_span_with_three_children_in_its_trace(opened: Bundle) -> None:
    sdk = pytest.importorskip("opentelemetry.sdk.trace", reason="needs opentelemetry-sdk, of the extra dev")
    from opentelemetry import trace
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, provider = InMemorySpanExporter(), sdk.TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    with running(opened, ServiceOptions(rows=2, capacity=64), Traced()) as server:
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
        httpx.post(f"{server.url}/v1/completions", json=ASKED, headers=headers, timeout=60)
        httpx.post(f"{server.url}/v1/completions", json=ASKED | {"timeout": 1e-6}, timeout=60)
        assert server.idle()
    whole, late = [span for span in exporter.get_finished_spans() if span.name == "dspark.request"]
    assert f"{whole.context.trace_id:032x}" == TRACE  # its parent is PARENT, or the framework's own span below that
    assert whole.attributes["dspark.generated_tokens"] == 5 and whole.attributes["dspark.finish_reason"] == "length"
    children = {span.name: span for span in exporter.get_finished_spans() if span.parent == whole.context}
    assert list(children) == ["queue", "prefill", "decode"]
    edges = [(span.start_time, span.end_time) for span in children.values()]
    assert edges[0][0] == whole.start_time and edges[-1][1] == whole.end_time
    assert edges[0][1] == edges[1][0] and edges[1][1] == edges[2][0]
    assert late.context.trace_id != whole.context.trace_id
    assert (late.status.status_code.name, late.status.description) == ("ERROR", "DeadlineExceeded")


def test_without_an_sdk_it_serves_all_the_same(opened: Bundle) -> None:
    pytest.importorskip("opentelemetry", reason="needs opentelemetry-api, which comes with opentelemetry-sdk")
    with running(opened, ServiceOptions(rows=1, capacity=64), Traced()) as server:
        answer = httpx.post(f"{server.url}/v1/completions", json=ASKED, timeout=60)
        assert answer.json()["usage"]["completion_tokens"] == 5


def test_without_opentelemetry_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with pytest.raises(UsageError, match="opentelemetry-instrument"):
        Traced()
