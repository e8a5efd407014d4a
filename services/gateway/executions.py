"""What execution is told, and what its answers and failures mean for the hold and for a stream."""

from __future__ import annotations

import hashlib
from typing import Any, Final

from services.gateway.principals import Principal
from services.gateway.receipts import Facts
from services.runtime.errors import Failure, NotSent, Reason
from sluice.execution.v1 import execution_service_pb2
from sluice.inference.v1 import answer_pb2, inference_service_pb2

_NO_RECEIPT: Final = inference_service_pb2.RECEIPT_VIEW_NONE
_UNBILLED: Final = frozenset(
    (
        Reason.REQUEST_INVALID, Reason.REQUEST_TOO_LARGE, Reason.FIELD_UNSUPPORTED, Reason.MODEL_NOT_FOUND,
        Reason.CONTEXT_WINDOW_EXCEEDED, Reason.PERMISSION_DENIED, Reason.NO_CANDIDATE, Reason.PROVIDER_REJECTED,
        Reason.PROVIDER_AUTHENTICATION, Reason.PROVIDER_RATE_LIMITED, Reason.PROVIDER_OVERLOADED, Reason.BREAKER_OPEN,
        Reason.OVERLOADED, Reason.DRAINING,
    )
)  # fmt: skip
"""Failures after which nothing can have been charged, even where execution doesn't say the cost."""
_UNBILLED_ATTEMPTS: Final = frozenset((*(reason.value for reason in _UNBILLED), Reason.PROVIDER_UNAVAILABLE.value))
"""The same for single attempts: who couldn't be reached or answered with an error of its own charges nothing."""


def fill_request(
    request: execution_service_pb2.CompleteRequest | execution_service_pb2.StreamCompleteRequest, facts: Facts
) -> None:
    """Fills an empty request with what was prepared."""
    wanted = facts.request
    plan, lease, shape = facts.plan, facts.lease, facts.shape
    assert shape is not None, "checked before"
    assert plan is not None, "planned before"
    assert lease is not None, "admitted before"
    assert facts.input_count is not None, "counted before"
    if facts.candidates is plan.candidates and not facts.hold_id:
        # Candidates and payer are mostly those of the last request: one copy instead of ten assignments.
        kind = type(request)
        template = plan.templates.get(kind)
        if template is None or template[0] is not facts.principal or template[1] != lease.lease_id:
            # Any: of two types, whose fields here are the same.
            message: Any = kind()
            for candidate in plan.messages:
                message.candidates.add().CopyFrom(candidate)
            fill_billing(message.billing, facts)
            message.billing.ClearField("request_key")
            template = plan.templates[kind] = (facts.principal, lease.lease_id, message)
        request.CopyFrom(template[2])
        request.billing.hold_nano_usd = facts.hold
        if facts.request_key:
            request.billing.request_key = facts.request_key
    else:
        request.candidates.extend([candidate.message for candidate in facts.candidates])
        fill_billing(request.billing, facts)
    request.operation_id = facts.operation_id
    conversation = request.conversation
    conversation.CopyFrom(wanted.conversation)
    if facts.max_output:
        conversation.max_output_tokens = facts.max_output
    if shape.has_labels:
        request.metadata.MergeFrom(wanted.metadata)
        end_user = wanted.end_user
        if end_user:
            request.end_user_hash = end_user_hash(facts.principal, end_user)
    request.input_count.CopyFrom(facts.input_count)
    if wanted.receipt_view == _NO_RECEIPT and not wanted.request_id:
        # With a request id others may join, who want one.
        request.omit_attempts = True


def embed_to_proto(facts: Facts, wanted: inference_service_pb2.EmbedRequest) -> execution_service_pb2.EmbedRequest:
    """The embedding to run."""
    request = execution_service_pb2.EmbedRequest(
        operation_id=facts.operation_id,
        candidates=[candidate.message for candidate in facts.candidates],
        inputs=wanted.inputs,
        end_user_hash=end_user_hash(facts.principal, wanted.end_user) if wanted.end_user else "",
        metadata=wanted.metadata,
    )
    fill_billing(request.billing, facts)
    if wanted.HasField("dimension_count"):
        request.dimension_count = wanted.dimension_count
    return request


def fill_billing(billing: execution_service_pb2.Billing, facts: Facts) -> None:
    """Who pays, and what is reserved."""
    principal, plan, lease = facts.principal, facts.plan, facts.lease
    assert plan is not None, "planned before"
    assert lease is not None, "admitted before"
    billing.tenant_id = principal.tenant_id
    billing.project_id = principal.project_id
    billing.key_id = principal.key_id
    billing.hold_nano_usd = facts.hold
    billing.task_type = plan.task_type
    billing.request_key = facts.request_key
    if facts.hold_id:
        billing.hold_id = facts.hold_id
    else:
        billing.lease_id = lease.lease_id


def end_user_hash(principal: Principal, end_user: str) -> str:
    """What a provider is told of the application's user: equal for equal names of a tenant, and nothing more."""
    return hashlib.sha256(f"{principal.tenant_id}\0{end_user}".encode()).hexdigest()


def settled_cost(failure: Failure) -> int | None:
    """What execution charged before it failed, nano-dollars; None: it doesn't say, and something may have been charged."""
    said = failure.metadata.get("cost_nano_usd")
    if said is not None and said.isascii() and said.isdigit():
        return int(said)
    if failure.reason in _UNBILLED or isinstance(failure, NotSent):
        return 0
    if failure.reason is Reason.ALL_CANDIDATES_FAILED:
        reasons = [value.rpartition(" ")[2] for key, value in failure.metadata.items() if key.startswith("attempt/")]
        if reasons and all(reason in _UNBILLED_ATTEMPTS for reason in reasons):
            return 0
    return None


def deltas_of(answer: answer_pb2.Answer) -> execution_service_pb2.DeltaBatch:
    """A whole answer as pieces of a stream."""
    batch = execution_service_pb2.DeltaBatch()
    calls = 0
    for part in answer.message.parts:
        kind = part.WhichOneof("kind")
        if kind == "text":
            batch.deltas.add(text=part.text)
        elif kind == "refusal":
            batch.deltas.add(refusal=part.refusal)
        elif kind == "reasoning":
            batch.deltas.add(reasoning=part.reasoning)
        elif kind == "tool_call":
            call = part.tool_call
            batch.deltas.add(
                tool_call=answer_pb2.ToolCallDelta(index=calls, id=call.id, name=call.name, arguments_json=call.arguments_json)
            )
            calls += 1
    return batch
