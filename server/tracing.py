"""OpenTelemetry spans of requests, with the attributes of the GenAI conventions. They contain no text.

The spans are written when a request has ended, from the same record as its log line: a server span, with the children
``queue``, ``prefill`` and ``decode`` as far as the request got. The ingress of a cluster writes a span around it. The
attributes are those of
https://opentelemetry.io/docs/specs/semconv/gen-ai/, and vLLM's ``gen_ai.latency.*`` for latencies.
"""

from __future__ import annotations

from collections.abc import Mapping

from server.api.inference.request_record import RequestRecord
from server.errors import ConfigurationError

try:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.trace import Span, SpanKind, Status, StatusCode, set_span_in_context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    has_opentelemetry = True
except ModuleNotFoundError:
    has_opentelemetry = False

_EXPORT_SECONDS = 5
_NANOSECONDS = 10**9


class RequestTracer:
    """Writes the spans of requests that use the model; others, such as uploads, have none.

    Args:
        processor: Receives the spans.
    """

    def __init__(self, processor: SpanProcessor) -> None:
        self._provider = _provider("prelude", processor)
        self._tracer = self._provider.get_tracer("prelude")
        self._propagator = TraceContextTextMapPropagator()

    @classmethod
    def to(cls, endpoint: str) -> RequestTracer:
        """Create a tracer that sends spans to a collector, in batches from a separate thread.

        Args:
            endpoint: URL for OTLP over HTTP, such as ``http://127.0.0.1:4318/v1/traces``.

        Raises:
            ConfigurationError: If OpenTelemetry is not installed, or the endpoint is not a URL.
        """
        return cls(_processor(endpoint))

    def observe(self, record: RequestRecord) -> None:
        """Write the spans of a request that has ended."""
        if record.operation is None:
            return
        context = self._propagator.extract({"traceparent": record.traceparent or ""})
        span = self._tracer.start_span(
            f"{record.operation} {record.model}",
            context=context,
            kind=SpanKind.SERVER,
            start_time=_at(record, record.started),
            attributes=_attributes(record),
        )
        if record.error is not None:
            span.set_attribute("error.type", record.error)
        if record.outcome == "error" or (record.status or 0) >= 500:
            span.set_status(Status(StatusCode.ERROR))
        self._add_phases(record, span)
        span.end(_at(record, record.started + (record.total_seconds or 0.0)))

    def close(self) -> None:
        """Send the remaining spans, for at most a few seconds."""
        self._provider.shutdown()

    def _add_phases(self, record: RequestRecord, parent: Span) -> None:
        """Add the spans of the engine's phases, relative to the time of the first output."""
        first = record.first_output
        if first is None:
            return
        prefill_start = first - (record.prefill_seconds or 0.0)
        phases = (
            ("queue", prefill_start - (record.queue_seconds or 0.0), record.queue_seconds),
            ("prefill", prefill_start, record.prefill_seconds),
            ("decode", first, record.decode_seconds),
        )
        context = set_span_in_context(parent)
        for name, start, seconds in phases:
            if seconds is not None:
                span = self._tracer.start_span(name, context=context, start_time=_at(record, start))
                span.end(_at(record, start + seconds))


class IngressSpan:
    """The span of one request at the ingress of a cluster.

    Attributes:
        headers: ``traceparent``, and ``tracestate`` if there is one, for the replica: its spans are children.

    Args:
        span: The span, which has begun.
    """

    def __init__(self, span: Span) -> None:
        self._span = span
        self.headers: dict[str, str] = {}
        TraceContextTextMapPropagator().inject(self.headers, set_span_in_context(span))

    def end(self, *, status: int, base: str, replica: str) -> None:
        """Write the span.

        Args:
            status: HTTP status of the answer.
            base: The base model; empty if that was not found out.
            replica: The replica that was chosen last; empty if there was none.
        """
        self._span.set_attribute("http.response.status_code", status)
        for name, value in (("prelude.base", base), ("prelude.replica", replica)):
            if value:
                self._span.set_attribute(name, value)
        if status >= 500:
            self._span.set_attribute("error.type", str(status))
            self._span.set_status(Status(StatusCode.ERROR))
        self._span.end()


class IngressTracer:
    """Writes the spans of the ingress of a cluster. They contain no text.

    Args:
        processor: Receives the spans.
    """

    def __init__(self, processor: SpanProcessor) -> None:
        self._provider = _provider("prelude-ingress", processor)
        self._tracer = self._provider.get_tracer("prelude")

    @classmethod
    def to(cls, endpoint: str) -> IngressTracer:
        """Create a tracer that sends spans to a collector; arguments and errors are those of ``RequestTracer.to``."""
        return cls(_processor(endpoint))

    def begin(self, method: str, path: str, headers: Mapping[str, str]) -> IngressSpan:
        """Begin the span of a request.

        Args:
            method: Its HTTP method.
            path: Its path, one of few: it is a part of the span's name.
            headers: Its ``traceparent`` and ``tracestate``, if it has them; otherwise a trace begins.
        """
        return IngressSpan(
            self._tracer.start_span(
                f"{method} {path}",
                context=TraceContextTextMapPropagator().extract(headers),
                kind=SpanKind.SERVER,
                attributes={"http.request.method": method, "http.route": path},
            )
        )

    def close(self) -> None:
        """Send the remaining spans, for at most a few seconds."""
        self._provider.shutdown()


def _processor(endpoint: str) -> SpanProcessor:
    if not has_opentelemetry:
        raise ConfigurationError("--otlp-traces-endpoint needs OpenTelemetry: pip install 'prelude-server[tracing]'")
    if not endpoint.startswith(("http://", "https://")):
        raise ConfigurationError(f"--otlp-traces-endpoint: {endpoint!r} is not an http:// or https:// URL")
    return BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint, timeout=_EXPORT_SECONDS))


def _provider(service: str, processor: SpanProcessor) -> TracerProvider:
    provider = TracerProvider(resource=Resource.create({"service.name": service}), shutdown_on_exit=False)
    provider.add_span_processor(processor)
    return provider


def _at(record: RequestRecord, moment: float) -> int:
    """Convert a time of the monotonic clock to Unix nanoseconds."""
    return int((record.started_at + moment - record.started) * _NANOSECONDS)


def _attributes(record: RequestRecord) -> Mapping[str, str | int | float | list[str]]:
    finished = [record.outcome] if record.outcome in {"stop", "length"} else None
    values = {
        "gen_ai.operation.name": record.operation,
        "gen_ai.provider.name": "prelude",
        "gen_ai.request.model": record.model,
        "gen_ai.request.id": record.request_id,
        "gen_ai.response.finish_reasons": finished,
        "gen_ai.usage.input_tokens": record.prompt_tokens,
        "gen_ai.usage.output_tokens": record.completion_tokens,
        "gen_ai.usage.cache_read.input_tokens": record.cached_tokens,
        "gen_ai.latency.time_in_queue": record.queue_seconds,
        "gen_ai.latency.time_in_model_prefill": record.prefill_seconds,
        "gen_ai.latency.time_in_model_decode": record.decode_seconds,
        "gen_ai.latency.time_to_first_token": record.first_token_seconds,
        "gen_ai.latency.e2e": record.total_seconds,
        "http.request.method": record.method,
        "http.response.status_code": record.status,
        "prelude.adapter.name": record.adapter,
        "prelude.adapter.version": record.adapter_version,
        "prelude.outcome": record.outcome,
        "prelude.prompt.name": record.prompt,
        "prelude.prompt.version": record.version,
        "prelude.tenant": record.tenant,
        "prelude.usage.virtual_tokens": record.virtual_tokens,
    }
    return {name: value for name, value in values.items() if value is not None}
