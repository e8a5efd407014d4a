"""Translations between `sluice.jobs.v1` and jobs."""

from __future__ import annotations

from types import MappingProxyType
from typing import Final

from google.protobuf.timestamp_pb2 import Timestamp

from services.batching.job import Job, State
from services.batching.ports import Ticket
from services.runtime.status import failure_from_status, status_from_failure
from sluice.inference.v1 import inference_service_pb2
from sluice.jobs.v1 import job_service_pb2 as pb2

_STATES: Final = MappingProxyType(
    {
        State.QUEUED: pb2.JOB_STATE_QUEUED,
        State.RUNNING: pb2.JOB_STATE_RUNNING,
        State.RETRYING: pb2.JOB_STATE_RETRYING,
        State.SUCCEEDED: pb2.JOB_STATE_SUCCEEDED,
        State.FAILED: pb2.JOB_STATE_FAILED,
        State.DEAD: pb2.JOB_STATE_DEAD,
        State.CANCELLED: pb2.JOB_STATE_CANCELLED,
        State.EXPIRED: pb2.JOB_STATE_EXPIRED,
    }
)
_BY_VALUE: Final = MappingProxyType({value: state for state, value in _STATES.items()})


def timestamp(seconds: float) -> Timestamp | None:
    """A Unix time as a message; None for 0, which means not yet."""
    if not seconds:
        return None
    message = Timestamp()
    message.FromMicroseconds(round(seconds * 1e6))
    return message


def seconds_of(message: Timestamp) -> float:
    """A timestamp as Unix seconds."""
    return message.ToMicroseconds() / 1e6


def state_from_proto(value: int) -> State | None:
    """The state, or None for UNSPECIFIED and unknown values."""
    return _BY_VALUE.get(value)  # type: ignore[call-overload,no-any-return]  # an int off the wire is looked up as is


def job_to_proto(job: Job, *, full: bool) -> pb2.Job:
    """A job as its tenant sees it; with request and response only when `full`."""
    assert isinstance(job.request, inference_service_pb2.GenerateRequest)
    message = pb2.Job(
        id=job.id,
        state=_STATES[job.state],
        attempt_count=job.attempts,
        create_time=timestamp(job.create_time),
        start_time=timestamp(job.start_time),
        end_time=timestamp(job.end_time),
        next_attempt_time=timestamp(job.next_attempt_time),
        job_class=job.job_class,
        deadline_time=timestamp(job.deadline_time),
        key_id=job.key_id,
    )
    if job.failure is not None:
        message.error.CopyFrom(status_from_failure(job.failure))
    if full:
        message.request.CopyFrom(job.request)
        if job.response is not None:
            assert isinstance(job.response, inference_service_pb2.GenerateResponse)
            message.response.CopyFrom(job.response)
    return message


def record_to_proto(job: Job) -> pb2.JobRecord:
    """A job as the table keeps it."""
    return pb2.JobRecord(
        job=job_to_proto(job, full=True),
        tenant_id=job.tenant_id,
        project_id=job.project_id,
        submit_sha256=job.submit_sha256,
        generation=job.generation,
        allowed_models=job.allowed_models,
        cache_namespace=job.cache_namespace,
    )


def record_from_proto(record: pb2.JobRecord) -> Job:
    """A job as the table kept it."""
    message = record.job
    return Job(
        id=message.id,
        tenant_id=record.tenant_id,
        project_id=record.project_id,
        key_id=message.key_id,
        job_class=message.job_class,
        request=message.request,
        submit_sha256=record.submit_sha256,
        create_time=seconds_of(message.create_time),
        not_before_time=0.0,
        deadline_time=seconds_of(message.deadline_time),
        state=_BY_VALUE[message.state],
        attempts=message.attempt_count,
        response=message.response if message.HasField("response") else None,
        failure=failure_from_status(message.error) if message.HasField("error") else None,
        start_time=seconds_of(message.start_time),
        end_time=seconds_of(message.end_time),
        next_attempt_time=seconds_of(message.next_attempt_time),
        generation=record.generation,
        allowed_models=tuple(record.allowed_models),
        cache_namespace=record.cache_namespace,
    )


def ticket_to_proto(ticket: Ticket) -> pb2.JobMessage:
    """A ticket as it travels."""
    job = ticket.job
    assert isinstance(job.request, inference_service_pb2.GenerateRequest)
    return pb2.JobMessage(
        job_id=job.id,
        tenant_id=job.tenant_id,
        project_id=job.project_id,
        attempt_number=ticket.attempt,
        submit=pb2.SubmitJobRequest(
            request=job.request,
            job_class=job.job_class,
            not_before_time=timestamp(job.not_before_time),
            deadline_time=timestamp(job.deadline_time),
        ),
        key_id=job.key_id,
        create_time=timestamp(job.create_time),
        submit_sha256=job.submit_sha256,
        generation=job.generation,
        allowed_models=job.allowed_models,
        cache_namespace=job.cache_namespace,
    )


def ticket_from_proto(message: pb2.JobMessage) -> Ticket:
    """A ticket off the queue; its job is in the state of its first acceptance."""
    submit = message.submit
    job = Job(
        id=message.job_id,
        tenant_id=message.tenant_id,
        project_id=message.project_id,
        key_id=message.key_id,
        job_class=submit.job_class,
        request=submit.request,
        submit_sha256=message.submit_sha256,
        create_time=seconds_of(message.create_time),
        not_before_time=seconds_of(submit.not_before_time),
        deadline_time=seconds_of(submit.deadline_time),
        generation=message.generation,
        allowed_models=tuple(message.allowed_models),
        cache_namespace=message.cache_namespace,
    )
    return Ticket(job, message.attempt_number)
