"""Jobs, clocks and requests for tests."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from services.batching.job import Job, job_id
from services.runtime.errors import Code, Failure, Reason
from sluice.inference.v1 import answer_pb2, conversation_pb2, inference_service_pb2

NOW = 1_800_000_000.0
BUSY = Failure(Reason.PROVIDER_UNAVAILABLE, "the provider is down")
WRONG = Failure(Reason.REQUEST_INVALID, "the request is wrong", metadata={"field": "x"})


class Clock:
    """Unix time that a test sets."""

    def __init__(self, time: float = NOW) -> None:
        self.time = time

    def __call__(self) -> float:
        return self.time


def generate_request(text: str = "hello") -> inference_service_pb2.GenerateRequest:
    """A request of one user turn."""
    part = conversation_pb2.Part(text=text)
    message = conversation_pb2.Message(role=conversation_pb2.ROLE_USER, parts=[part])
    return inference_service_pb2.GenerateRequest(conversation=conversation_pb2.Conversation(messages=[message]))


def generate_response(text: str = "hi") -> inference_service_pb2.GenerateResponse:
    """An answer."""
    part = conversation_pb2.Part(text=text)
    answer = answer_pb2.Answer(message=conversation_pb2.Message(role=conversation_pb2.ROLE_ASSISTANT, parts=[part]))
    return inference_service_pb2.GenerateResponse(operation_id="op_1", answer=answer)


def job(
    request_id: str = "r1",
    tenant: str = "acme",
    text: str = "hello",
    job_class: str = "default",
    now: float = NOW,
    **changes: Any,
) -> Job:
    """A queued job."""
    made = Job(
        id=job_id(tenant, request_id),
        tenant_id=tenant,
        project_id="default",
        key_id="key_1",
        job_class=job_class,
        request=generate_request(text),
        submit_sha256=hashlib.sha256(f"{job_class} {text}".encode()).digest(),
        create_time=now,
        not_before_time=0.0,
        deadline_time=now + 86_400,
    )
    return replace(made, **changes)


@contextlib.contextmanager
def refused(reason: Reason, code: Code, **metadata: str) -> Iterator[None]:
    """The block fails so, with these values among its metadata."""
    with pytest.raises(Failure) as caught:
        yield
    assert (caught.value.reason, caught.value.code) == (reason, code)
    assert metadata.items() <= dict(caught.value.metadata).items(), caught.value
