"""Traces by OpenTelemetry, when an OTLP endpoint is configured; otherwise nothing, at no cost.

A span per served call, joined across processes by `traceparent`. Services add attributes with `annotate`, under the names
of the GenAI semantic conventions (https://opentelemetry.io/docs/specs/semconv/gen-ai/), which are listed here as constants.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from services.runtime.call import Call
from services.runtime.interceptors import Stage

if TYPE_CHECKING:
    # Importing it for real loads the exporter.
    from services.runtime.tracing import RequestSpan, Tracing

OPERATION_NAME: Final = "gen_ai.operation.name"
PROVIDER_NAME: Final = "gen_ai.provider.name"
REQUEST_MODEL: Final = "gen_ai.request.model"
REQUEST_MAX_TOKENS: Final = "gen_ai.request.max_tokens"
RESPONSE_ID: Final = "gen_ai.response.id"
RESPONSE_MODEL: Final = "gen_ai.response.model"
RESPONSE_FINISH_REASONS: Final = "gen_ai.response.finish_reasons"
USAGE_INPUT_TOKENS: Final = "gen_ai.usage.input_tokens"
USAGE_OUTPUT_TOKENS: Final = "gen_ai.usage.output_tokens"


class Telemetry:
    """The traces of a process. `endpoint` is that of an OTLP/gRPC collector, say `http://127.0.0.1:4317`; None: no traces."""

    def __init__(self, endpoint: str | None, service: str, replica_id: str, ratio: float) -> None:
        self._stage: Tracing | None = None
        self._provider: Any = None
        if endpoint is not None:
            from services.runtime import tracing  # noqa: PLC0415  # only when wanted

            self._provider = tracing.open_provider(tracing.otlp_exporter(endpoint), service, replica_id, ratio)
            self._stage = tracing.Tracing(self._provider.get_tracer("sluice"))

    @property
    def enabled(self) -> bool:
        """Whether spans are made."""
        return self._stage is not None

    def begin(self, name: str, metadata: Mapping[str, str]) -> RequestSpan | None:
        """A span for a request that isn't a call of the method table (HTTP); None without traces. The caller ends it."""
        return None if self._stage is None else self._stage.begin(name, metadata)

    def stage(self) -> Stage | None:
        """The chain's stage, None without traces."""
        return self._stage

    def close(self) -> None:
        """Sends what is left; blocks for some seconds at most."""
        if self._provider is not None:
            self._provider.shutdown()


def annotate(call: Call, attributes: Mapping[str, Any]) -> None:
    """Adds attributes to the span of `call`, if there is one. Guard what is costly to compute by `call.span is not None`."""
    span: Any = call.span
    if span is not None:
        span.set_attributes(attributes)
