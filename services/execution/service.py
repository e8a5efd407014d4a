"""The servicer of `sluice.execution.v1.ExecutionService`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from typing import Any, Final

from services.execution.attempts import Operation, Tried, fill_attempt
from services.execution.catalogue import Entry, read_credential
from services.execution.counts import Counts
from services.execution.errors import AttemptFailed
from services.execution.provider import Completed
from services.execution.spool import Spool
from services.execution.targets import Targets
from services.runtime.call import Call
from services.runtime.errors import Failure, Reason, invalid
from sluice.execution.v1 import execution_service_pb2 as pb2
from sluice.inference.v1 import inference_service_pb2
from sluice.routing.v1 import routing_service_pb2

MAX_CANDIDATES: Final = 16
MAX_INPUTS: Final = 2048
MAX_PAGE: Final = 1000
DEFAULT_PAGE: Final = 100
_MOST_REPORTS: Final = 10_000
_MOST_OF_A_MODEL: Final = 100
_REMEMBERED: Final = 10_000

Health = Callable[[], list[routing_service_pb2.TargetHealth]]


class Reports:
    """Attempts that ended since routing was last told: of each model the first few of an interval, which is all that percentiles need."""

    def __init__(self) -> None:
        self._reports: list[routing_service_pb2.AttemptReport] = []
        self._counts: dict[str, int] = {}

    def add(self, tried: Tried) -> None:
        """One more."""
        counts, model = self._counts, tried.record.model
        count = counts.get(model, 0)
        if count < _MOST_OF_A_MODEL and len(self._reports) < _MOST_REPORTS:
            counts[model] = count + 1
            # At once, and not the record itself: it keeps more than what is reported.
            self._reports.append(_reported(tried))

    def take(self) -> list[routing_service_pb2.AttemptReport]:
        """All of them, which are then forgotten."""
        taken, self._reports, self._counts = self._reports, [], {}
        return taken


def _reported(tried: Tried) -> routing_service_pb2.AttemptReport:
    record = tried.record
    report = routing_service_pb2.AttemptReport(
        model=record.model,
        outcome=record.outcome,
        error_reason=record.error_reason,
        duration=record.duration,
        usage=record.usage if record.HasField("usage") else None,
    )
    if tried.first_token_ns:
        report.first_token_duration.FromNanoseconds(tried.first_token_ns)
    return report


class ExecutionServicer:
    """Translates, makes one call, translates."""

    def __init__(
        self,
        targets: Targets,
        spool: Spool,
        reports: Reports,
        health: Health,
        entries: Callable[[], Mapping[str, Entry]],
        counts: Counts,
        *,
        first_byte: float,
    ) -> None:
        self._targets = targets
        self._spool = spool
        self._reports = reports
        self._health = health
        self._entries = entries
        self._counts = counts
        self._first_byte = first_byte
        self._now = asyncio.get_running_loop().time
        self._running: set[str] = set()
        # Two generations, the older of which goes as a whole: cheaper than one entry out for each that comes in.
        self._done: set[str] = set()
        self._done_before: set[str] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    async def wait_idle(self, seconds: float) -> None:
        """Waits until nothing runs here, and what was cancelled is settled."""
        try:
            async with asyncio.timeout(seconds):
                await self._idle.wait()
                await self._counts.wait_idle()
        except TimeoutError:
            return

    def _begin(self, request: Any, call: Call) -> Operation:
        """An operation; raises Failure REQUEST_INVALID, or STATE_CONFLICT for an operation that ran here already."""
        operation = request.operation_id
        if not operation or len(operation) > 128:
            raise invalid("operation_id", "must have 1 to 128 characters")
        if not 1 <= len(request.candidates) <= MAX_CANDIDATES:
            raise invalid("candidates", f"must have 1 to {MAX_CANDIDATES} entries, got {len(request.candidates)}")
        billing = request.billing
        if not (billing.tenant_id and billing.project_id and billing.key_id):
            raise invalid("billing", "must name tenant, project and key")
        if operation in self._running or operation in self._done or operation in self._done_before:
            # The same ids would be taken for the same attempts, and the second run would cost nothing.
            raise Failure(
                Reason.STATE_CONFLICT,
                f"operation {operation!r} ran here already; a new run needs an id of its own",
                metadata={"state": "ran"},
            )
        self._running.add(operation)
        self._idle.clear()
        return Operation(
            request,
            self._targets,
            self._spool,
            self._reports.add,
            call,
            self._now,
            self._counts.count,
            self._counts.later,
            first_byte_seconds=self._first_byte,
        )

    def _end(self, operation: Operation) -> None:
        operation.close()
        self._running.remove(operation.id)
        done = self._done
        done.add(operation.id)
        if len(done) >= _REMEMBERED:
            self._done, self._done_before = set(), done
        if not self._running:
            self._idle.set()

    async def Complete(self, request: pb2.CompleteRequest, call: Call) -> pb2.CompleteResponse:
        """See the proto."""
        if not request.conversation.messages:
            raise invalid("conversation", "must have at least one message")
        operation = self._begin(request, call)
        try:
            completed = await operation.complete()
        except Failure as failure:
            raise _costed(failure, operation) from None
        finally:
            self._end(operation)
        response: pb2.CompleteResponse | None = completed.reply
        if response is None:
            response = pb2.CompleteResponse()
            response.answer.CopyFrom(completed.answer)
        response.attempt_count = len(operation.tried)
        if not request.omit_attempts:
            _fill_attempts(response.attempts, operation)
        response.cost_nano_usd = operation.cost
        response.price_version = operation.price_version
        return response

    async def StreamComplete(self, request: pb2.StreamCompleteRequest, call: Call) -> AsyncIterator[pb2.StreamCompleteResponse]:
        """See the proto."""
        if not request.conversation.messages:
            raise invalid("conversation", "must have at least one message")
        response = pb2.StreamCompleteResponse
        operation = self._begin(request, call)
        events: AsyncGenerator[Any, None] | None = None
        try:
            events = await operation.open_stream()
            async for event in events:
                if type(event) is bytes:
                    piece = response()
                    piece.wire = event
                    yield piece
                elif isinstance(event, pb2.DeltaBatch):
                    yield response(deltas=event)
                elif isinstance(event, Completed):
                    last = response()
                    finished = last.finished
                    finished.answer.CopyFrom(event.answer)
                    finished.attempt_count = len(operation.tried)
                    if not request.omit_attempts:
                        _fill_attempts(finished.attempts, operation)
                    finished.cost_nano_usd = operation.cost
                    finished.price_version = operation.price_version
                    yield last
                else:
                    yield response(opened=event)
        except Failure as failure:
            raise _costed(failure, operation) from None
        finally:
            # By name: a caller that leaves must find the attempt settled and the socket closed, not some turns later.
            if events is not None:
                await events.aclose()
            self._end(operation)

    async def Embed(self, request: pb2.EmbedRequest, call: Call) -> pb2.EmbedResponse:
        """See the proto."""
        if not 1 <= len(request.inputs) <= MAX_INPUTS:
            raise invalid("inputs", f"must have 1 to {MAX_INPUTS} entries, got {len(request.inputs)}")
        operation = self._begin(request, call)
        try:
            embedded, model = await operation.embed()
        except Failure as failure:
            raise _costed(failure, operation) from None
        finally:
            self._end(operation)
        response = pb2.EmbedResponse()
        _fill_attempts(response.attempts, operation)
        response.embeddings.extend([inference_service_pb2.Embedding(values=vector) for vector in embedded.vectors])
        response.usage.CopyFrom(embedded.usage)
        response.cost_nano_usd = operation.cost
        response.price_version = operation.price_version
        response.model = model
        return response

    async def ListProviders(self, request: pb2.ListProvidersRequest, call: Call) -> pb2.ListProvidersResponse:
        """See the proto."""
        if not 0 <= request.page_size <= MAX_PAGE:
            raise invalid("page_size", f"must be 0 to {MAX_PAGE}, got {request.page_size}")
        size = request.page_size or DEFAULT_PAGE
        entries = self._entries()
        names = [name for name in sorted(entries) if name > request.page_token]
        health = self._health()
        providers = []
        for name in names[:size]:
            entry, probe = entries[name], self._targets.probes.get(name)
            provider = pb2.Provider(
                id=name,
                kind=entry.kind,
                base_url=entry.base_url,
                credential_source=entry.credential,
                credential_present=not entry.credential or bool(read_credential(entry.credential)),
                targets=[target for target in health if target.provider == name],
            )
            if probe is not None and probe.time:
                provider.probe_time.FromMicroseconds(round(probe.time * 1e6))
                provider.probe_duration.FromMicroseconds(round(probe.seconds * 1e6))
            providers.append(provider)
        return pb2.ListProvidersResponse(providers=providers, next_page_token=names[size - 1] if len(names) > size else "")


def _fill_attempts(field: Any, operation: Operation) -> None:
    for tried in operation.tried:
        fill_attempt(field.add(), tried)


def _costed(failure: Failure, operation: Operation) -> Failure:
    """`failure` with what the operation cost all the same, so that the caller can free the rest of its hold."""
    metadata = {**failure.metadata, "cost_nano_usd": str(operation.cost)}
    if isinstance(failure, AttemptFailed) and operation.tried:
        metadata.setdefault("model", operation.tried[-1].record.model)
    return Failure(failure.reason, failure.message, metadata=metadata, retry_delay=failure.retry_delay)
