"""Requests and answers for tests."""

from __future__ import annotations

from services.runtime.call import Call
from sluice.caching.v1 import caching_service_pb2 as pb2
from sluice.inference.v1 import answer_pb2, conversation_pb2, inference_service_pb2

CALL = Call("/sluice.caching.v1.CachingService/Lookup", deadline=1e12)
SEMANTIC = inference_service_pb2.CACHE_MODE_SEMANTIC
QUESTION = "What is the capital of France?"
PARAPHRASE = "What's the capital city of France?"


def lookup(
    text: str = QUESTION,
    *,
    tenant: str = "acme",
    mode: inference_service_pb2.CacheMode.ValueType = inference_service_pb2.CACHE_MODE_UNSPECIFIED,
    namespace: str = "",
    system: str = "Be brief.",
    model: str = "echo/echo",
) -> pb2.LookupRequest:
    request = pb2.LookupRequest(tenant_id=tenant, model=model, policy_version="v1")
    for role, words in ((conversation_pb2.ROLE_SYSTEM, system), (conversation_pb2.ROLE_USER, text)):
        request.conversation.messages.add(role=role).parts.add(text=words)
    if mode or namespace:
        request.wishes.mode = mode
        request.wishes.cache_namespace = namespace
    return request


def answered(
    text: str = "Paris.", finish: answer_pb2.FinishReason.ValueType = answer_pb2.FINISH_REASON_STOP
) -> pb2.CachedAnswer:
    entry = pb2.CachedAnswer(operation_id="op-1", cost_nano_usd=42)
    entry.create_time.seconds = 1_700_000_000
    entry.answer.message.role = conversation_pb2.ROLE_ASSISTANT
    if text:
        entry.answer.message.parts.add(text=text)
    entry.answer.finish_reason = finish
    return entry


def storing(ticket: bytes, *, tenant: str = "acme", entry: pb2.CachedAnswer | None = None) -> pb2.StoreRequest:
    return pb2.StoreRequest(tenant_id=tenant, ticket=ticket, answer=entry or answered())
