"""InferenceService: translates calls into those of the core."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Final, cast

from services.gateway.core import Completion, Core, Principal
from services.gateway.events import Opened
from services.gateway.owners import PASSED_ON
from services.runtime.call import Call, CallerKind
from services.runtime.errors import Failure, Reason, invalid
from sluice.execution.v1 import execution_service_pb2
from sluice.inference.v1 import inference_service_pb2

_BEARER: Final = "bearer "
_ALL_SCOPES: Final = ("inference",)


class InferenceService:
    """The servicer. Keys are checked here: `authorization: Bearer <key>`, or `x-api-key`.

    A service of the mesh may act for a tenant whose key it has checked earlier (a job runs long after it was submitted): it says whose
    by `x-sluice-tenant`, `x-sluice-project`, `x-sluice-key`, and passes on the key's `x-sluice-allowed-models` (comma-separated) and
    `x-sluice-cache-namespace`. From anybody else these are not read.
    """

    def __init__(self, core: Core, clock: Callable[[], float], *, max_seconds: float) -> None:
        """No call is given longer than `max_seconds`, whatever its deadline: what it holds of a budget is others' meanwhile."""
        self._core = core
        self._clock = clock
        self._max_seconds = max_seconds

    async def Generate(
        self, request: inference_service_pb2.GenerateRequest, call: Call
    ) -> inference_service_pb2.GenerateResponse:
        """As the contract says."""
        principal = await self._principal(call)
        completion = await self._core.generate(
            principal, request, deadline=self._deadline(call), forward=call.forward, passed_on=_passed_on(call)
        )
        response = inference_service_pb2.GenerateResponse(
            operation_id=completion.operation_id, answer=completion.answer, cost_nano_usd=completion.cost_nano_usd
        )
        if request.receipt_view != inference_service_pb2.RECEIPT_VIEW_NONE:
            response.receipt.CopyFrom(completion.receipt())
        return response

    async def StreamGenerate(
        self, request: inference_service_pb2.StreamGenerateRequest, call: Call
    ) -> AsyncIterator[inference_service_pb2.StreamGenerateResponse]:
        """As the contract says."""
        principal = await self._principal(call)
        # The two requests have the same fields under the same names, by contract; the core reads names only.
        wanted = cast(inference_service_pb2.GenerateRequest, request)
        events = self._core.stream(
            principal,
            wanted,
            accepted_wire=0,
            deadline=self._deadline(call),
            forward=call.forward,
            passed_on=_passed_on(call),
        )
        try:
            async for event in events:
                if isinstance(event, execution_service_pb2.DeltaBatch):
                    for delta in event.deltas:
                        yield inference_service_pb2.StreamGenerateResponse(delta=delta)
                elif isinstance(event, Opened):
                    yield inference_service_pb2.StreamGenerateResponse(
                        opened=inference_service_pb2.StreamOpened(operation_id=event.operation_id, model=event.model)
                    )
                elif isinstance(event, Completion):
                    yield inference_service_pb2.StreamGenerateResponse(closed=_closed(event, request.receipt_view))
        finally:
            await events.aclose()

    async def Embed(self, request: inference_service_pb2.EmbedRequest, call: Call) -> inference_service_pb2.EmbedResponse:
        """As the contract says."""
        principal = await self._principal(call)
        return await self._core.embed(
            principal, request, deadline=self._deadline(call), forward=call.forward, passed_on=_passed_on(call)
        )

    async def CountTokens(
        self, request: inference_service_pb2.CountTokensRequest, call: Call
    ) -> inference_service_pb2.CountTokensResponse:
        """As the contract says."""
        principal = await self._principal(call)
        return await self._core.count_tokens(principal, request, deadline=self._deadline(call), forward=call.forward)

    async def ListModels(
        self, request: inference_service_pb2.ListModelsRequest, call: Call
    ) -> inference_service_pb2.ListModelsResponse:
        """As the contract says."""
        principal = await self._principal(call)
        return await self._core.list_models(principal, request, deadline=self._deadline(call), forward=call.forward)

    async def Explain(self, request: inference_service_pb2.ExplainRequest, call: Call) -> inference_service_pb2.ExplainResponse:
        """As the contract says."""
        principal = await self._principal(call)
        if not request.HasField("request"):
            raise invalid("request", "is required")
        return await self._core.explain(principal, request, deadline=self._deadline(call), forward=call.forward)

    async def ReportOutcome(
        self, request: inference_service_pb2.ReportOutcomeRequest, call: Call
    ) -> inference_service_pb2.ReportOutcomeResponse:
        """As the contract says."""
        principal = await self._principal(call)
        return await self._core.report_outcome(principal, request)

    def _deadline(self, call: Call) -> float:
        return min(call.deadline, self._clock() + self._max_seconds)

    async def _principal(self, call: Call) -> Principal:
        if call.caller.kind is CallerKind.SERVICE and "x-sluice-tenant" in call.metadata:
            return _represented(call)
        secret = secret_of(call.metadata.get("authorization"), call.metadata.get("x-api-key"))
        if secret is not None:
            principal = self._core.known(secret)
            if principal is not None:
                return principal
        return await self._core.authenticate(secret)


def secret_of(authorization: str | None, api_key: str | None) -> str | None:
    """The key in a call's metadata; None: there is none."""
    if authorization is not None and authorization[: len(_BEARER)].lower() == _BEARER:
        return authorization[len(_BEARER) :].strip() or None
    return api_key.strip() or None if api_key is not None else None


def _passed_on(call: Call) -> Call | None:
    """The call if another gateway passed it on, so that it is run here. Nobody else can say so."""
    return call if call.caller.kind is CallerKind.SERVICE and PASSED_ON in call.metadata else None


def _represented(call: Call) -> Principal:
    metadata = call.metadata
    project, key = metadata.get("x-sluice-project", ""), metadata.get("x-sluice-key", "")
    tenant = metadata["x-sluice-tenant"]
    if not (tenant and project and key):
        raise Failure(
            Reason.SERVICE_IDENTITY, "a service that acts for a tenant sends x-sluice-tenant, x-sluice-project and x-sluice-key"
        )
    allowed = metadata.get("x-sluice-allowed-models", "")
    return Principal(
        tenant_id=tenant,
        project_id=project,
        key_id=key,
        scopes=_ALL_SCOPES,
        allowed_models=tuple(sorted(name for name in allowed.split(",") if name)),
        cache_namespace=metadata.get("x-sluice-cache-namespace", ""),
        expire_time=None,
    )


def _closed(completion: Completion, view: int) -> inference_service_pb2.StreamClosed:
    answer = completion.answer
    closed = inference_service_pb2.StreamClosed(
        finish_reason=answer.finish_reason, usage=answer.usage, cost_nano_usd=completion.cost_nano_usd
    )
    if view != inference_service_pb2.RECEIPT_VIEW_NONE:
        closed.receipt.CopyFrom(completion.receipt())
    return closed
