from __future__ import annotations

import random

import pytest

from services.metering.limits import UNLIMITED, Concurrency, Rates


def test_a_bucket_has_a_minutes_worth_and_then_fills_evenly() -> None:
    rates = Rates()
    assert rates.take({"a": 60}, 50, 0.0) == (50, 0.0)
    assert rates.take({"a": 60}, 50, 0.0) == (10, 0.0)
    none, wait = rates.take({"a": 60}, 50, 0.0)
    assert none == 0
    assert wait == pytest.approx(1.0)
    assert rates.take({"a": 60}, 50, 0.0 + wait) == (1, 0.0)
    assert rates.take({"a": 60}, 50, 11.0) == (10, 0.0)
    # It never holds more than a minute's worth.
    assert rates.take({"a": 60}, 500, 10_000.0) == (60, 0.0)


def test_the_tightest_of_several_decides_and_all_are_charged() -> None:
    rates = Rates()
    assert rates.take({"tenant": 100, "key": 10}, 50, 0.0)[0] == 10
    assert rates.left("tenant", 100, 0.0) == 90
    assert rates.left("key", 10, 0.0) == 0
    granted, wait = rates.take({"tenant": 100, "key": 10}, 50, 0.0)
    assert granted == 0
    assert wait == pytest.approx(6.0)
    assert rates.left("tenant", 100, 0.0) == 90


def test_without_limits_it_is_unlimited_and_a_limit_of_nothing_grants_nothing() -> None:
    rates = Rates()
    assert rates.take({}, 5, 0.0) == (UNLIMITED, 0.0)
    assert rates.take({"a": -1}, 5, 0.0) == (UNLIMITED, 0.0)
    assert rates.take({"a": -1, "b": 2}, 5, 0.0) == (2, 0.0)
    assert rates.take({"c": 0}, 5, 0.0) == (0, 60.0)


def test_asking_for_nothing_takes_nothing() -> None:
    rates = Rates()
    rates.take({"a": 1}, 1, 0.0)
    assert rates.take({"a": 1}, 0, 0.0) == (0, 0.0)


def test_a_changed_limit_moves_what_is_left_with_it() -> None:
    rates = Rates()
    rates.take({"a": 60}, 40, 0.0)
    assert rates.left("a", 100, 0.0) == 60
    assert rates.left("a", 30, 0.0) == 0
    assert rates.left("a", 60, 0.0) == 30


def test_what_is_given_back_can_be_taken_again_up_to_the_limit() -> None:
    rates = Rates()
    rates.take({"a": 10}, 10, 0.0)
    rates.give_back(["a", "unknown"], 4)
    assert rates.take({"a": 10}, 10, 0.0)[0] == 4
    rates.give_back(["a"], 400)
    assert rates.left("a", 10, 0.0) == 10


def test_a_clock_that_goes_back_gives_nothing_away() -> None:
    rates = Rates()
    rates.take({"a": 60}, 60, 100.0)
    assert rates.take({"a": 60}, 60, 40.0)[0] == 0
    assert rates.take({"a": 60}, 60, 41.0)[0] == 1


def test_over_any_time_no_more_is_granted_than_a_bucket_and_its_filling() -> None:
    drawn = random.Random(3)
    rates, granted, now = Rates(), 0, 0.0
    for _ in range(2000):
        now += drawn.random()
        granted += rates.take({"a": 120}, drawn.randrange(10), now)[0]
        assert granted <= 120 + 120 * now / 60
    # And no less than the filling, as so much was asked for.
    assert granted >= 120 * now / 60


def test_while_all_wishes_fit_each_lease_gets_its_own() -> None:
    shares = Concurrency()
    assert shares.share("a", {"t": 10}, 4, 30.0, 0.0) == 4
    assert shares.share("b", {"t": 10}, 5, 30.0, 0.0) == 5
    assert shares.share("c", {"t": 10}, 5, 30.0, 0.0) == 1
    assert shares.used("t") == 10
    assert shares.share("d", {}, 5, 30.0, 0.0) == UNLIMITED
    assert shares.share("d", {"u": -1}, 5, 30.0, 0.0) == UNLIMITED
    assert shares.share("d", {"v": 0}, 5, 30.0, 0.0) == 0


def test_a_lease_that_has_less_than_an_even_part_is_let_up_to_it() -> None:
    shares = Concurrency()
    assert shares.share("a", {"t": 10}, 10, 30.0, 0.0) == 10
    assert shares.share("b", {"t": 10}, 10, 30.0, 0.0) == 0
    assert shares.share("a", {"t": 10}, 10, 30.0, 1.0) == 5
    assert shares.share("b", {"t": 10}, 10, 30.0, 1.0) == 5


def test_a_share_ends_with_its_lease_or_when_it_is_returned() -> None:
    shares = Concurrency()
    shares.share("a", {"t": 10}, 10, 30.0, 0.0)
    assert shares.share("b", {"t": 10}, 10, 60.0, 29.9) == 0
    assert shares.share("b", {"t": 10}, 10, 60.0, 30.0) == 10
    shares.release("b")
    shares.release("b")
    assert shares.used("t") == 0
    assert shares.share("c", {"t": 10}, 10, 60.0, 30.0) == 10


def test_several_limits_hold_at_once() -> None:
    shares = Concurrency()
    assert shares.share("a", {"tenant": 10, "key-1": 3}, 8, 30.0, 0.0) == 3
    assert shares.share("b", {"tenant": 10, "key-2": 9}, 8, 30.0, 0.0) == 7
    assert (shares.used("tenant"), shares.used("key-1"), shares.used("key-2")) == (10, 3, 7)


def test_shares_never_add_up_to_more_than_a_limit() -> None:
    drawn = random.Random(5)
    shares, limits = Concurrency(), {"tenant": 20, "project": 12}
    for now in range(1000):
        lease = f"lease-{drawn.randrange(6)}"
        if drawn.random() < 0.1:
            shares.release(lease)
        else:
            shares.share(lease, limits, drawn.randrange(1, 15), now + drawn.randrange(1, 20), float(now))
        assert shares.used("tenant") <= 20
        assert shares.used("project") <= 12
