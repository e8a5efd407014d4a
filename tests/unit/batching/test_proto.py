from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.batching.job import Job, State
from services.batching.ports import Ticket
from services.batching.proto import (
    job_to_proto,
    record_from_proto,
    record_to_proto,
    seconds_of,
    state_from_proto,
    ticket_from_proto,
    ticket_to_proto,
    timestamp,
)
from services.runtime.errors import Failure, Reason
from services.runtime.status import failure_from_status
from sluice.jobs.v1 import job_service_pb2 as pb2
from tests.unit.batching.examples import NOW, generate_response, job

FAILURE = Failure(Reason.PROVIDER_RATE_LIMITED, "slow down", metadata={"provider": "x"}, retry_delay=2.5)


def full(**changes: object) -> Job:
    """A job with every field set."""
    made = job(
        start_time=NOW + 1.25,
        end_time=NOW + 2.5,
        next_attempt_time=NOW + 3,
        attempts=3,
        generation=2,
        allowed_models=("a", "b"),
        cache_namespace="shop",
        response=generate_response(),
    )
    return replace(made, **changes)  # type: ignore[arg-type]  # names are those of Job


@pytest.mark.parametrize("state", list(State))
def test_every_state_has_a_value_of_its_own(state: State) -> None:
    message = job_to_proto(job(state=state), full=False)
    assert message.state == pb2.JobState.Value(f"JOB_STATE_{state.name}")
    assert state_from_proto(message.state) is state


def test_no_value_is_left_without_a_state() -> None:
    assert {state_from_proto(value) for value in pb2.JobState.values()} == {None, *State}
    assert state_from_proto(pb2.JOB_STATE_UNSPECIFIED) is None
    assert state_from_proto(99) is None


@pytest.mark.parametrize("state", list(State))
def test_a_row_of_the_table_is_the_whole_job(state: State) -> None:
    made = full(state=state)
    read = record_from_proto(pb2.JobRecord.FromString(record_to_proto(made).SerializeToString()))
    assert read == made


def test_a_row_keeps_why_it_failed() -> None:
    read = record_from_proto(record_to_proto(full(failure=FAILURE, response=None)))
    assert read.response is None
    assert read.failure is not None
    assert (read.failure.reason, read.failure.message, read.failure.retry_delay) == (FAILURE.reason, "slow down", 2.5)
    assert dict(read.failure.metadata) == {"provider": "x"}


def test_a_ticket_rebuilds_the_job_as_it_was_accepted() -> None:
    accepted = job(not_before_time=NOW + 60, allowed_models=("a",), cache_namespace="shop", generation=2, job_class="slow")
    worn = replace(accepted, state=State.RETRYING, attempts=2, failure=FAILURE, start_time=NOW)
    message = pb2.JobMessage.FromString(ticket_to_proto(Ticket(worn, 3)).SerializeToString())
    assert ticket_from_proto(message) == Ticket(accepted, 3)


def test_what_a_tenant_sees() -> None:
    message = job_to_proto(full(failure=FAILURE), full=True)
    assert (message.id, message.attempt_count, message.key_id, message.job_class) == (job().id, 3, "key_1", "default")
    assert seconds_of(message.start_time) == NOW + 1.25
    assert message.request == job().request
    assert message.response == generate_response()
    assert failure_from_status(message.error).reason is Reason.PROVIDER_RATE_LIMITED


def test_lists_carry_neither_request_nor_response() -> None:
    message = job_to_proto(full(), full=False)
    assert not message.HasField("request")
    assert not message.HasField("response")


def test_what_has_not_happened_is_absent() -> None:
    message = job_to_proto(job(), full=True)
    absent = {"start_time", "end_time", "next_attempt_time", "error", "response"}
    assert absent.isdisjoint(field.name for field, _ in message.ListFields())
    assert timestamp(0.0) is None


@given(st.integers(1, 253_402_300_799_000_000))
def test_times_are_kept_to_the_microsecond(microseconds: int) -> None:
    made = timestamp(microseconds / 1e6)
    assert made is not None
    # A float has 53 bits, enough for microseconds until the year 2255; an error of one more is the float's.
    assert abs(made.ToMicroseconds() - microseconds) <= 32
    assert timestamp(seconds_of(made)) == made
