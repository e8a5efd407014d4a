"""One call for many."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from services.gateway.flights import Flights
from services.runtime.errors import Failure, Reason, deadline_exceeded


async def test_followers_get_what_the_leader_got() -> None:
    flights: Flights[str, int] = Flights("a number")
    calls = 0

    async def call() -> int:
        nonlocal calls
        calls += 1
        await asyncio.sleep(0.01)
        return 7

    assert await asyncio.gather(*(flights.run("k", call, 1.0) for _ in range(5))) == [7] * 5
    assert calls == 1
    assert not flights.is_running("k")


async def test_followers_get_the_leaders_failure() -> None:
    flights: Flights[str, int] = Flights("a number")

    async def call() -> int:
        await asyncio.sleep(0.01)
        raise Failure(Reason.KEY_INVALID, "no")

    results = await asyncio.gather(*(flights.run("k", call, 1.0) for _ in range(3)), return_exceptions=True)
    assert all(isinstance(result, Failure) and result.reason is Reason.KEY_INVALID for result in results)


async def test_a_cancelled_leader_is_followed_by_the_next() -> None:
    flights: Flights[str, int] = Flights("a number")
    gate = asyncio.Event()

    async def call() -> int:
        await gate.wait()
        return 7

    leader = asyncio.create_task(flights.run("k", call, 1.0))
    await asyncio.sleep(0)
    follower = asyncio.create_task(flights.run("k", call, 1.0))
    await asyncio.sleep(0)
    leader.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await leader
    gate.set()
    assert await follower == 7


async def test_a_leader_that_ran_out_of_time_does_not_end_the_others() -> None:
    flights: Flights[str, int] = Flights("a number")
    calls = 0

    async def call() -> int:
        nonlocal calls
        calls += 1
        await asyncio.sleep(0.01)
        if calls == 1:
            raise deadline_exceeded("the first")
        return 7

    first, second = await asyncio.gather(flights.run("k", call, 1.0), flights.run("k", call, 1.0), return_exceptions=True)
    assert isinstance(first, Failure)
    assert second == 7


async def test_a_follower_waits_no_longer_than_it_may() -> None:
    flights: Flights[str, int] = Flights("a number")

    async def call() -> int:
        await asyncio.sleep(5)
        return 7

    leader = asyncio.create_task(flights.run("k", call, 10.0))
    await asyncio.sleep(0)
    with pytest.raises(Failure) as caught:
        await flights.run("k", call, 0.02)
    assert caught.value.reason is Reason.DEADLINE_EXCEEDED
    leader.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await leader
