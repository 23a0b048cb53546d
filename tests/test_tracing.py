"""Spans cover every phase, have the conventions' attributes, join the client's trace and contain no text."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from server import tracing
from server.api.inference.request_record import RequestRecord
from server.errors import ConfigurationError
from server.tracing import IngressTracer, RequestTracer
from tests.support.presence import present

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def tracer(exporter: InMemorySpanExporter) -> Iterator[RequestTracer]:
    tracer = RequestTracer(SimpleSpanProcessor(exporter))
    yield tracer
    tracer.close()


def made(**values: Any) -> RequestRecord:
    fields = {
        "request_id": "r",
        "method": "POST",
        "path": "/v1/chat/completions",
        "operation": "chat",
        "model": "intent",
        "prompt": "intent",
        "version": 3,
        "tenant": "acme",
        "status": 200,
        "outcome": "stop",
        "prompt_tokens": 12,
        "completion_tokens": 5,
        "cached_tokens": 0,
        "virtual_tokens": 20,
        "input": "a secret text",
        "started": 100.0,
        "started_at": 1_700_000_000.0,
        "first_output": 100.5,
        "queue_seconds": 0.1,
        "prefill_seconds": 0.25,
        "first_token_seconds": 0.45,
        "decode_seconds": 1.0,
        "total_seconds": 2.0,
    }
    return RequestRecord(**(fields | values))  # type: ignore[arg-type]


def times(span: ReadableSpan) -> tuple[float, float]:
    began, ended = span.start_time, span.end_time
    assert began is not None
    assert ended is not None
    return began / 1e9 - 1_700_000_000, ended / 1e9 - 1_700_000_000


def test_a_request_is_a_span_with_its_phases(tracer: RequestTracer, exporter: InMemorySpanExporter) -> None:
    tracer.observe(made(traceparent=f"00-{TRACE}-00f067aa0ba902b7-01"))
    queue, prefill, decode, root = exporter.get_finished_spans()
    assert [span.name for span in (queue, prefill, decode, root)] == ["queue", "prefill", "decode", "chat intent"]
    assert root.kind is SpanKind.SERVER
    assert {f"{span.context.trace_id:032x}" for span in (queue, prefill, decode, root)} == {TRACE}
    assert f"{present(root.parent).span_id:016x}" == "00f067aa0ba902b7"
    assert {present(span.parent).span_id for span in (queue, prefill, decode)} == {root.context.span_id}
    assert times(root) == pytest.approx((0, 2))
    assert times(queue) == pytest.approx((0.15, 0.25), abs=1e-6)
    assert times(prefill) == pytest.approx((0.25, 0.5), abs=1e-6)
    assert times(decode) == pytest.approx((0.5, 1.5), abs=1e-6)
    assert (
        present(root.attributes).items()
        >= {
            "gen_ai.operation.name": "chat",
            "gen_ai.request.model": "intent",
            "gen_ai.usage.input_tokens": 12,
            "gen_ai.usage.output_tokens": 5,
            "gen_ai.usage.cache_read.input_tokens": 0,
            "gen_ai.response.finish_reasons": ("stop",),
            "gen_ai.latency.time_to_first_token": 0.45,
            "prelude.prompt.version": 3,
            "prelude.tenant": "acme",
        }.items()
    )
    assert root.status.status_code is StatusCode.UNSET
    assert "secret" not in root.to_json()


def test_a_refused_request_is_one_span(tracer: RequestTracer, exporter: InMemorySpanExporter) -> None:
    absent = dict.fromkeys(
        ("first_output", "queue_seconds", "prefill_seconds", "first_token_seconds", "decode_seconds", "outcome")
    )
    tracer.observe(made(**absent, status=503, error="engine_restarting", traceparent="nonsense"))
    (span,) = exporter.get_finished_spans()
    assert span.parent is None
    attributes = present(span.attributes)
    assert attributes["error.type"] == "engine_restarting"
    assert span.status.status_code is StatusCode.ERROR
    assert "gen_ai.response.finish_reasons" not in attributes


def test_requests_that_the_client_does_not_sample_are_not_exported(
    tracer: RequestTracer, exporter: InMemorySpanExporter
) -> None:
    tracer.observe(made(traceparent=f"00-{TRACE}-00f067aa0ba902b7-00"))
    tracer.observe(made(operation=None))
    assert exporter.get_finished_spans() == ()


def test_a_missing_extra_and_a_bad_url_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    for tracer in (RequestTracer, IngressTracer):
        with pytest.raises(ConfigurationError, match="is not an http"):
            tracer.to("collector:4318")
    monkeypatch.setattr(tracing, "has_opentelemetry", False)
    for tracer in (RequestTracer, IngressTracer):
        with pytest.raises(ConfigurationError, match=r"prelude-server\[tracing\]"):
            tracer.to("http://127.0.0.1:4318/v1/traces")


def test_spans_arrive_at_a_collector() -> None:
    received: list[tuple[str, bytes]] = []

    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Collector) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            tracer = RequestTracer.to(f"http://127.0.0.1:{server.server_port}/v1/traces")
            tracer.observe(made())
            tracer.close()
            ingress = IngressTracer.to(f"http://127.0.0.1:{server.server_port}/v1/traces")
            ingress.begin("POST", "/v1/completions", {}).end(status=200, base="demo", replica="r0")
            ingress.close()
        finally:
            server.shutdown()
            thread.join()
    assert [path for path, _ in received] == ["/v1/traces"] * 2
    bodies = [body for _, body in received]
    assert b"chat intent" in bodies[0]
    assert b"secret" not in bodies[0]
    assert b"POST /v1/completions" in bodies[1]
    assert b"prelude-ingress" in bodies[1]
