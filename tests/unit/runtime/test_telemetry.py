from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from services.runtime import telemetry
from services.runtime.call import Call
from services.runtime.dispatch import build_table
from services.runtime.errors import Failure
from services.runtime.interceptors import inner_chain
from services.runtime.metrics import Registry
from services.runtime.telemetry import Telemetry, annotate
from services.runtime.tracing import Tracing, open_provider
from sluice.tokenization.v1.tokenization_service_pb2 import CountTextsRequest
from tests.unit.runtime.fakes import BUDGET, Lines, Script, bindings

PATH = "/sluice.tokenization.v1.TokenizationService/CountTexts"
TRACE = "0af7651916cd43dd8448eb211c80319c"


class Kept(SpanExporter):
    def __init__(self) -> None:
        self.spans: list[ReadableSpan] = []

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.spans.extend(spans)
        return SpanExportResult.SUCCESS


async def test_a_span_per_call_joined_to_its_caller() -> None:
    exporter, script = Kept(), Script()
    provider = open_provider(exporter, "tokenization", "replica", 1.0)
    tracing = Tracing(provider.get_tracer("test"))
    table = build_table(bindings(script), inner_chain(log=Lines(), registry=Registry(), slow_seconds=5, trace=tracing))
    handler = table[PATH].unary
    assert handler is not None
    metadata = {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01", "x-request-id": "r-1"}
    for model in ("x", "budget", "crash"):
        call = Call(PATH, asyncio.get_running_loop().time() + 5, metadata, forward=(("x-request-id", "r-1"),))
        try:
            await handler(CountTextsRequest(model=model), call)
        except Failure:
            continue
        annotate(call, {telemetry.REQUEST_MODEL: "m"})
    await asyncio.to_thread(provider.shutdown)
    assert len(exporter.spans) == 3
    assert {f"{span.context.trace_id:032x}" for span in exporter.spans if span.context} == {TRACE}
    good, refused, broken = exporter.spans
    assert good.name == PATH[1:]
    assert (good.attributes or {})["sluice.request_id"] == "r-1"
    assert (refused.attributes or {})["error.type"] == "BUDGET_EXHAUSTED"
    assert refused.status.is_unset
    assert not broken.status.is_ok
    assert not broken.status.is_unset
    forwarded = dict(script.calls[0].forward)
    assert forwarded["x-request-id"] == "r-1"
    assert good.context is not None
    assert forwarded["traceparent"] == f"00-{TRACE}-{good.context.span_id:016x}-01"


async def test_a_request_over_http_is_the_parent_of_its_calls() -> None:
    exporter = Kept()
    provider = open_provider(exporter, "gateway", "replica", 1.0)
    span = Tracing(provider.get_tracer("test")).begin("POST /v1/x", {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"})
    span.annotate({telemetry.REQUEST_MODEL: "m"})
    span.end(BUDGET)
    await asyncio.to_thread(provider.shutdown)
    (ended,) = exporter.spans
    assert ended.context is not None
    assert dict(span.forward)["traceparent"] == f"00-{TRACE}-{ended.context.span_id:016x}-01"
    assert (ended.attributes or {})["gen_ai.request.model"] == "m"
    assert (ended.attributes or {})["error.type"] == "BUDGET_EXHAUSTED"


async def test_without_an_endpoint_there_is_nothing() -> None:
    off = Telemetry(None, "gateway", "replica", 1.0)
    assert off.stage() is None
    assert off.begin("POST /v1/x", {}) is None
    assert not off.enabled
    annotate(Call(PATH, 0.0), {"a": 1})
    off.close()


@pytest.mark.timeout(30)
async def test_a_collector_that_is_not_there_holds_nothing_up() -> None:
    on = Telemetry("http://127.0.0.1:1", "gateway", "replica", 1.0)
    assert on.enabled
    await asyncio.to_thread(on.close)
