"""The breaker, on the figures of reliability.md T15, with a clock of the test's own."""

from __future__ import annotations

import random

import pytest

from services.execution.breaker import Breaker, Figures, State


class Clock:
    """Time that a test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    """At 1,000 s."""
    return Clock()


def make(clock: Clock, seed: int = 1, figures: Figures | None = None) -> Breaker:
    return Breaker(figures or Figures(), clock, random.Random(seed))


def state_of(breaker: Breaker) -> State:
    """Read anew: the type checker takes an attribute for unchanged."""
    return breaker.state


def fail(breaker: Breaker, count: int = 1, retry_delay: float | None = None) -> None:
    for _ in range(count):
        assert breaker.allow()
        breaker.failed(retry_delay)


def succeed(breaker: Breaker, count: int = 1) -> None:
    for _ in range(count):
        assert breaker.allow()
        breaker.succeeded()


def test_the_figures_are_those_of_the_design() -> None:
    assert Figures() == Figures(failures=5, window=10.0, calls=20, share=0.5, cooldown=30.0, longest=300.0, successes=3)


def test_it_opens_at_the_fifth_failure_in_a_row(clock: Clock) -> None:
    breaker = make(clock)
    fail(breaker, 4)
    assert state_of(breaker) is State.CLOSED
    succeed(breaker)
    fail(breaker, 4)
    assert state_of(breaker) is State.CLOSED
    fail(breaker)
    assert state_of(breaker) is State.OPEN
    assert not breaker.allow()
    assert breaker.in_flight == 0


@pytest.mark.parametrize("failing_first", [True, False])
def test_at_half_errors_it_opens_within_twenty_requests_of_the_first_error(clock: Clock, failing_first: bool) -> None:
    breaker = make(clock)
    calls = 0
    succeed(breaker, 50)
    while state_of(breaker) is State.CLOSED:
        assert calls < 21
        assert breaker.allow()
        if (calls % 2 == 0) == failing_first:
            breaker.failed()
        else:
            breaker.succeeded()
        calls += 1
        clock.now += 0.1
    assert calls - (not failing_first) <= 20


def test_a_few_errors_among_many_calls_leave_it_closed(clock: Clock) -> None:
    breaker = make(clock)
    for _ in range(200):
        fail(breaker)
        succeed(breaker, 2)
        clock.now += 0.05
    assert state_of(breaker) is State.CLOSED


def test_errors_outside_the_window_do_not_count(clock: Clock) -> None:
    breaker = make(clock)
    for _ in range(200):
        fail(breaker)
        succeed(breaker)
        # 18 calls fall into each window of 10 s: too few.
        clock.now += 1.12
    assert state_of(breaker) is State.CLOSED


def test_while_open_no_call_passes_until_the_cooldown_with_its_jitter(clock: Clock) -> None:
    waits = set()
    for seed in range(50):
        breaker = make(clock, seed)
        fail(breaker, 5)
        began, wait = clock.now, breaker.retry_delay()
        assert 24.0 <= wait <= 36.0
        waits.add(round(wait, 3))
        clock.now = began + wait - 0.001
        assert not breaker.allow()
        assert state_of(breaker) is State.OPEN
        clock.now = began + wait
        assert state_of(breaker) is State.HALF_OPEN
        assert breaker.allow()
    # Breakers that opened together don't probe together.
    assert len(waits) > 40


def test_half_open_passes_one_call_at_a_time_and_closes_after_three_successes(clock: Clock) -> None:
    breaker = make(clock)
    fail(breaker, 5)
    clock.now += 36.0
    for _ in range(3):
        assert state_of(breaker) is State.HALF_OPEN
        assert breaker.allow()
        assert not breaker.allow()
        assert breaker.in_flight == 1
        breaker.succeeded()
    assert state_of(breaker) is State.CLOSED
    assert breaker.allow()
    assert breaker.allow()


def test_each_failed_probe_doubles_the_cooldown_up_to_the_longest(clock: Clock) -> None:
    breaker = make(clock)
    fail(breaker, 5)
    for expected in (60.0, 120.0, 240.0, 300.0, 300.0):
        clock.now += breaker.retry_delay()
        fail(breaker)
        assert expected * 0.8 <= breaker.retry_delay() <= expected * 1.2
        assert not breaker.allow()
    clock.now += breaker.retry_delay()
    succeed(breaker, 3)
    fail(breaker, 5)
    # Recovered, it begins with the short one again.
    assert breaker.retry_delay() <= 36.0


def test_faults_of_callers_never_open_it_and_free_a_probe(clock: Clock) -> None:
    breaker = make(clock)
    for _ in range(100):
        assert breaker.allow()
        breaker.ignored()
    assert state_of(breaker) is State.CLOSED
    fail(breaker, 5)
    clock.now += 36.0
    assert breaker.allow()
    breaker.ignored()
    assert state_of(breaker) is State.HALF_OPEN
    assert breaker.allow()
    assert breaker.in_flight == 1


def test_they_do_not_end_a_row_of_failures_either(clock: Clock) -> None:
    breaker = make(clock)
    fail(breaker, 4)
    assert breaker.allow()
    breaker.ignored()
    fail(breaker)
    assert state_of(breaker) is State.OPEN


def test_retry_after_opens_it_at_once_and_for_as_long(clock: Clock) -> None:
    breaker = make(clock)
    fail(breaker, retry_delay=7.0)
    assert state_of(breaker) is State.OPEN
    assert breaker.retry_delay() == 7.0
    clock.now += 7.0
    assert breaker.allow()
    breaker.failed(200.0)
    assert breaker.retry_delay() == 200.0


def test_retry_after_is_bounded_and_a_moment_opens_nothing(clock: Clock) -> None:
    breaker = make(clock)
    fail(breaker, retry_delay=0.5)
    assert state_of(breaker) is State.CLOSED
    fail(breaker, retry_delay=3600.0)
    assert breaker.retry_delay() == 300.0


def test_calls_that_end_after_it_opened_change_nothing(clock: Clock) -> None:
    breaker = make(clock)
    for _ in range(8):
        assert breaker.allow()
    for _ in range(5):
        breaker.failed()
    wait = breaker.retry_delay()
    breaker.failed()
    breaker.succeeded()
    breaker.ignored()
    assert state_of(breaker) is State.OPEN
    assert breaker.retry_delay() == wait
    assert breaker.in_flight == 0
