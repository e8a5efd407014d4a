from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.batching.job import FINAL, Retries, State, job_id, may_succeed_later
from services.runtime.errors import CODES, Code, Failure, Reason
from tests.unit.batching.examples import BUSY, NOW, WRONG, generate_response, job

RETRIES = Retries(most=3, first=1.0, longest=300.0)


def test_a_job_runs_and_succeeds() -> None:
    queued = job()
    running = queued.started(NOW + 1)
    assert (running.state, running.attempts, running.start_time) == (State.RUNNING, 1, NOW + 1)
    answer = generate_response()
    done = running.succeeded(answer, NOW + 2)
    assert (done.state, done.response, done.end_time, done.attempts) == (State.SUCCEEDED, answer, NOW + 2, 1)
    assert queued.state is State.QUEUED


def test_a_retry_keeps_why_and_when_and_an_answer_forgets_it() -> None:
    retrying = job().started(NOW).retrying(BUSY, NOW + 5)
    assert (retrying.state, retrying.failure, retrying.next_attempt_time) == (State.RETRYING, BUSY, NOW + 5)
    again = retrying.started(NOW + 5)
    assert (again.state, again.attempts, again.next_attempt_time) == (State.RUNNING, 2, 0.0)
    assert again.succeeded(generate_response(), NOW + 6).failure is None


def test_an_end_without_a_failure_keeps_the_last_one() -> None:
    retrying = job().started(NOW).retrying(BUSY, NOW + 5)
    cancelled = retrying.ended(State.CANCELLED, NOW + 1)
    assert (cancelled.failure, cancelled.next_attempt_time, cancelled.end_time) == (BUSY, 0.0, NOW + 1)
    assert retrying.ended(State.DEAD, NOW + 1, WRONG).failure is WRONG


def test_a_redriven_job_starts_from_nothing() -> None:
    dead = job(not_before_time=NOW + 1).started(NOW).retrying(BUSY, NOW).started(NOW).ended(State.DEAD, NOW, BUSY)
    again = dead.redriven(NOW + 100, 60.0)
    assert (again.state, again.attempts, again.failure, again.end_time) == (State.QUEUED, 0, None, 0.0)
    assert (again.deadline_time, again.not_before_time, again.generation, again.id) == (NOW + 160, 0.0, 1, dead.id)


@pytest.mark.parametrize("state", list(State))
def test_final_states_are_those_that_have_ended(state: State) -> None:
    goes_on = {State.QUEUED, State.RUNNING, State.RETRYING}
    assert (state in FINAL) is (state not in goes_on)
    assert job(state=state).is_final is (state not in goes_on)


def test_backoff_doubles_within_a_quarter() -> None:
    for attempts, nominal in ((1, 1.0), (2, 2.0), (3, 4.0)):
        for _ in range(50):
            delay = RETRIES.delay(attempts, BUSY)
            assert delay is not None
            assert 0.75 * nominal <= delay <= 1.25 * nominal


def test_jobs_that_failed_together_come_back_apart() -> None:
    assert len({RETRIES.delay(1, BUSY) for _ in range(50)}) > 10
    assert len({Retries(9, 1.0, 2.0).delay(8, BUSY) for _ in range(50)}) > 10


def test_three_retries_and_no_more() -> None:
    assert RETRIES.delay(3, BUSY) is not None
    assert RETRIES.delay(4, BUSY) is None
    assert Retries(0, 1.0, 300.0).delay(1, BUSY) is None


@given(st.integers(1, 21), st.floats(0.1, 3600), st.floats(0.1, 86_400), st.none() | st.floats(0, 1e6))
def test_no_backoff_is_longer_than_the_longest(attempts: int, first: float, longest: float, named: float | None) -> None:
    delay = Retries(20, first, longest).delay(attempts, Failure(Reason.OVERLOADED, "", retry_delay=named))
    assert (delay is None) is (attempts > 20)
    assert delay is None or 0 < delay <= longest


def test_a_delay_that_the_failure_names_is_kept() -> None:
    assert RETRIES.delay(1, Failure(Reason.PROVIDER_RATE_LIMITED, "", retry_delay=20.0)) == 20.0
    assert RETRIES.delay(1, Failure(Reason.PROVIDER_RATE_LIMITED, "", retry_delay=9999.0)) == 300.0
    small = RETRIES.delay(3, Failure(Reason.PROVIDER_RATE_LIMITED, "", retry_delay=0.1))
    assert small is not None
    assert small >= 3.0


@pytest.mark.parametrize("reason", list(Reason))
def test_only_what_may_pass_is_tried_again(reason: Reason) -> None:
    passing = {Code.UNAVAILABLE, Code.RESOURCE_EXHAUSTED, Code.DEADLINE_EXCEEDED, Code.INTERNAL, Code.CANCELLED}
    failure = Failure(reason, "")
    # Nothing makes a request smaller.
    expected = CODES[reason] in passing and reason is not Reason.REQUEST_TOO_LARGE
    assert may_succeed_later(failure) is expected
    assert (RETRIES.delay(1, failure) is not None) is expected


def test_ids_repeat_per_tenant_and_request() -> None:
    assert job_id("acme", "r1") == job_id("acme", "r1")
    assert len({job_id("acme", "r1"), job_id("acme", "r2"), job_id("other", "r1"), job_id("acm", "er1")}) == 4
    assert job_id("a:1", "b") != job_id("a", "1:b")


@given(st.text(max_size=20), st.text(max_size=20))
def test_ids_are_fit_for_a_subject(tenant: str, request: str) -> None:
    made = job_id(tenant, request)
    assert len(made) >= 26
    assert made.replace("_", "").isalnum()
    assert made.isascii()


def test_without_a_request_id_every_job_is_its_own() -> None:
    assert len({job_id("acme", "") for _ in range(100)}) == 100
