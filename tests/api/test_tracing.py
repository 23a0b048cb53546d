"""Spans of requests to the application."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import httpx
import pytest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from server.tracing import RequestTracer
from tests.support.live_server import LiveServer
from tests.support.presence import present


def test_requests_of_each_kind_are_traced(
    monkeypatch: pytest.MonkeyPatch, make_app: Callable[..., Any], settings: Any, engine: Any
) -> None:
    exporter = InMemorySpanExporter()
    monkeypatch.setattr(RequestTracer, "to", lambda _: RequestTracer(SimpleSpanProcessor(exporter)))
    engine.queue_seconds = 0.01
    traced = replace(settings, otlp_traces_endpoint="http://collector")
    with LiveServer(make_app(traced), traced).running() as live, httpx.Client(base_url=live.url) as client:
        live.wait_until_ready()
        body = {"prompt": "abc", "max_tokens": 4, "messages": [{"role": "user", "content": "hi"}]}
        for path, more in (
            ("/v1/completions", {}),
            ("/v1/completions", {"stream": True}),
            ("/v1/chat/completions", {}),
            ("/v1/classify", {"input": "a", "labels": ["x", "y"]}),
        ):
            client.post(path, json=body | more).raise_for_status()
        assert client.post("/v1/completions", json=body | {"model": "none"}).status_code == 404
        client.get("/v1/models").raise_for_status()
    roots = [span for span in exporter.get_finished_spans() if span.parent is None]
    assert [present(span.attributes)["gen_ai.operation.name"] for span in roots] == [
        *["text_completion"] * 2,
        "chat",
        "classify",
        "text_completion",
    ]
    assert present(roots[-1].attributes)["error.type"] == "model_not_found"
    assert [present(span.attributes).get("gen_ai.usage.output_tokens") for span in roots] == [4, 4, 4, 0, None]
    phases = [span.name for span in exporter.get_finished_spans() if span.parent is not None]
    assert [phases.count(name) for name in ("queue", "prefill", "decode")] == [3, 3, 3]
