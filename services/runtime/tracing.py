"""Spans by OpenTelemetry. Imported only when traces are on: the exporter costs 100 ms and 20 MB at start."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import Span, SpanKind, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from services.runtime.call import Call, Metadata
from services.runtime.dispatch import Method
from services.runtime.errors import Code, Failure
from services.runtime.interceptors import After, Before

_EXPORT_TIMEOUT_SECONDS: Final = 2
_MAX_WAITING_SPANS: Final = 4096


def otlp_exporter(endpoint: str) -> SpanExporter:
    """Sends spans to the OTLP/gRPC collector at `endpoint`; without TLS when it starts with `http://`."""
    return OTLPSpanExporter(endpoint=endpoint, insecure=endpoint.startswith("http://"), timeout=_EXPORT_TIMEOUT_SECONDS)


def open_provider(exporter: SpanExporter, service: str, replica_id: str, ratio: float) -> TracerProvider:
    """A provider whose spans go to `exporter` in batches; those that it doesn't take in time are dropped."""
    provider = TracerProvider(
        sampler=ParentBased(TraceIdRatioBased(ratio)),
        resource=Resource.create({"service.namespace": "sluice", "service.name": service, "service.instance.id": replica_id}),
        shutdown_on_exit=False,
    )
    provider.add_span_processor(BatchSpanProcessor(exporter, max_queue_size=_MAX_WAITING_SPANS))
    return provider


class RequestSpan:
    """The span of a request that came in another way than a call of the method table, say over HTTP."""

    def __init__(self, span: Span, forward: Metadata) -> None:
        self._span = span
        self.forward = forward
        """To be added to the metadata of calls made for the request."""

    def annotate(self, attributes: Mapping[str, Any]) -> None:
        """Adds attributes, under the names listed in `telemetry`."""
        self._span.set_attributes(attributes)

    def end(self, failure: Failure | None = None) -> None:
        """Ends the span, with what the request failed with."""
        _end(self._span, failure)


def _end(span: Span, failure: Failure | None) -> None:
    if failure is not None:
        span.set_attribute("error.type", failure.reason.value)
        span.set_attribute("rpc.grpc.status_code", int(failure.code))
        if failure.code in (Code.INTERNAL, Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED):
            span.set_status(StatusCode.ERROR, failure.reason.value)
    span.end()


class Tracing:
    """The chain's stage that makes a span around every call."""

    name: Final = "trace"

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, name: str, metadata: Mapping[str, str]) -> RequestSpan:
        """A span for a request with `metadata` (lower-case keys), joined to the trace that its `traceparent` names."""
        span = self._tracer.start_span(name, self._propagator.extract(metadata), SpanKind.SERVER)
        carrier: dict[str, str] = {}
        self._propagator.inject(carrier, set_span_in_context(span))
        return RequestSpan(span, tuple(carrier.items()))

    def before(self, method: Method) -> Before | None:
        start = self._tracer.start_span
        propagator = self._propagator
        name = method.path.lstrip("/")
        attributes = {"rpc.system": "grpc", "rpc.service": method.service, "rpc.method": method.name}

        def run(call: Call) -> None:
            span = start(name, propagator.extract(call.metadata), SpanKind.SERVER, attributes)
            call.span = span
            carrier: dict[str, str] = {}
            propagator.inject(carrier, set_span_in_context(span))
            kept = [pair for pair in call.forward if pair[0] not in ("traceparent", "tracestate")]
            call.forward = (*kept, *carrier.items())
            for key, value in kept:
                if key == "x-request-id":
                    span.set_attribute("sluice.request_id", value)

        return run

    def after(self, method: Method) -> After | None:
        def run(call: Call, seconds: float, failure: Failure | None) -> None:
            span: Any = call.span
            if span is not None:
                _end(span, failure)

        return run
