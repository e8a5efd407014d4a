"""Slices: admission, refills, money, outages."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import pytest

from services.runtime.errors import Failure, Reason
from tests.unit.gateway.fakes import World, down


@contextlib.asynccontextmanager
async def running(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """A worker runs meanwhile."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def working(world: World) -> contextlib.AbstractAsyncContextManager[None]:
    """The worker of the leases runs meanwhile."""
    return running(world.leases.refill_forever())


async def eventually(condition: object) -> None:
    """Waits until a condition holds."""
    assert callable(condition)
    for _ in range(200):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never came true")


async def test_the_first_request_waits_and_the_next_do_not() -> None:
    world = World()
    assert world.leases.admit("key-1", 10) is None
    lease = await world.leases.admit_waiting("acme", "key-1", 10, 1.0)
    assert lease.in_flight == 1
    assert world.leases.admit("key-1", 10) is lease
    assert len(world.metering.asked("AcquireLease")) == 1


async def test_the_worker_says_that_this_replica_has_started_until_it_was_heard() -> None:
    world = World()
    world.metering.failures["EndReservations"] = down("metering")
    async with working(world):
        await eventually(lambda: world.metering.asked("EndReservations"))
        del world.metering.failures["EndReservations"]
        lease = await world.leases.admit_waiting("acme", "key-1", 10, 1.0)
        for count in range(2, 5):
            world.leases._want(lease)
            await eventually(lambda count=count: len(world.metering.asked("AcquireLease")) >= count)
    assert [request.replica_id for request in world.metering.asked("EndReservations")] == ["gateway-test"] * 2


async def test_many_first_requests_ask_once() -> None:
    world = World()
    world.metering.delays["AcquireLease"] = 0.02
    leases = await asyncio.gather(*(world.leases.admit_waiting("acme", "key-1", 1, 1.0) for _ in range(20)))
    assert len({id(lease) for lease in leases}) == 1
    assert len(world.metering.asked("AcquireLease")) == 1
    assert leases[0].in_flight == 20


async def test_a_slice_is_refilled_before_it_is_empty() -> None:
    world = World(request_slice=8)
    async with working(world):
        lease = await world.leases.admit_waiting("acme", "key-1", 1, 1.0)
        for _ in range(6):
            assert world.leases.admit("key-1", 1) is lease
        await eventually(lambda: len(world.metering.asked("AcquireLease")) == 2)
        wish = world.metering.asked("AcquireLease")[1]
        assert wish.lease_id == "lease-1"
        assert wish.left_request_count == 1
        assert wish.wanted_request_count == 7
        assert lease.requests == 8


async def test_sequences_rise_and_a_lost_answer_is_asked_for_again_as_it_was() -> None:
    world = World()
    world.metering.failures["AcquireLease"] = down("metering")
    with pytest.raises(Failure):
        await world.leases.admit_waiting("acme", "key-1", 1, 1.0)
    world.metering.failures.clear()
    await asyncio.sleep(1.05)
    lease = await world.leases.admit_waiting("acme", "key-1", 1, 1.0)
    await world.leases.take_waiting(lease, 1, 1.0)
    first, second = world.metering.asked("AcquireLease")[:2]
    assert first.sequence == second.sequence
    assert first == second


async def test_a_used_up_rate_says_when_to_retry() -> None:
    world = World()
    world.metering.requests = 3
    world.metering.retry_delay = 7.0
    for _ in range(3):
        world.leases.admit("key-1", 1) or await world.leases.admit_waiting("acme", "key-1", 1, 1.0)
    with pytest.raises(Failure) as caught:
        await world.leases.admit_waiting("acme", "key-1", 1, 1.0)
    failure = caught.value
    assert failure.reason is Reason.RATE_LIMITED
    assert failure.metadata == {"limit": "120", "level": "key"}
    assert failure.retry_delay is not None
    assert 6.0 < failure.retry_delay <= 7.0
    asked = len(world.metering.asked("AcquireLease"))
    with pytest.raises(Failure):
        await world.leases.admit_waiting("acme", "key-1", 1, 1.0)
    # Until then metering isn't bothered.
    assert len(world.metering.asked("AcquireLease")) == asked


async def test_what_is_left_of_a_limit_is_what_nobody_has_and_what_this_replica_has_not_used() -> None:
    world = World()
    assert world.leases.standings("key-1") == []
    world.metering.requests = 120
    seen = []
    for _ in range(3):
        world.leases.admit("key-1", 1) or await world.leases.admit_waiting("acme", "key-1", 1, 1.0)
        (standing,) = world.leases.standings("key-1")
        seen.append(standing)
    # The clock runs: a token or two may have come back meanwhile.
    assert [(one.kind, one.limit) for one in seen] == [("requests", 120)] * 3
    assert all(expected <= one.remaining <= expected + 2 for one, expected in zip(seen, (119, 118, 117), strict=True))
    assert all(one.reset == (120 - one.remaining) * 0.5 for one in seen)


async def test_too_many_at_once() -> None:
    world = World()
    world.metering.concurrency = 2
    lease = await world.leases.admit_waiting("acme", "key-1", 1, 1.0)
    assert world.leases.admit("key-1", 1) is lease
    with pytest.raises(Failure) as caught:
        await world.leases.admit_waiting("acme", "key-1", 1, 1.0)
    assert caught.value.reason is Reason.CONCURRENCY_LIMITED
    assert caught.value.retry_delay is not None
    world.leases.leave(lease, 0)
    assert world.leases.admit("key-1", 1) is lease


async def test_tokens_are_corrected_when_the_request_is_over() -> None:
    world = World()
    lease = await world.leases.admit_waiting("acme", "key-1", 100, 1.0)
    left = lease.tokens
    world.leases.leave(lease, 50)
    assert lease.tokens == left - 50
    assert lease.in_flight == 0


async def test_money_is_held_and_given_back() -> None:
    world = World(nano_usd=1000)
    world.metering.budget = 1000
    lease = await world.leases.admit_waiting("acme", "key-1", 1, 1.0)
    assert world.leases.take(lease, 600)
    assert not world.leases.take(lease, 600)
    world.leases.settle(lease, lease.generation, 600, 100)
    assert (lease.money, lease.held) == (900, 0)


async def test_a_larger_hold_is_asked_for() -> None:
    world = World(nano_usd=1000)
    world.metering.budget = 100_000
    lease = await world.leases.admit_waiting("acme", "key-1", 1, 1.0)
    assert await world.leases.take_waiting(lease, 5000, 1.0)
    assert lease.held == 5000


async def test_what_metering_does_not_have_is_not_taken() -> None:
    world = World(nano_usd=1000)
    world.metering.budget = 1000
    lease = await world.leases.admit_waiting("acme", "key-1", 1, 1.0)
    assert not await world.leases.take_waiting(lease, 5000, 1.0)
    assert (lease.money, lease.held) == (1000, 0)


async def test_a_hold_of_an_old_slice_gives_nothing_to_the_new_one() -> None:
    world = World(nano_usd=1000)
    world.metering.budget = 10_000
    world.metering.lease_seconds = 0.05
    lease = await world.leases.admit_waiting("acme", "key-1", 1, 1.0)
    assert world.leases.take(lease, 400)
    generation = lease.generation
    await asyncio.sleep(0.06)
    world.metering.lease_seconds = 60.0
    await world.leases.admit_waiting("acme", "key-1", 1, 1.0)
    before = lease.money
    world.leases.settle(lease, generation, 400, 0)
    assert lease.money == before
    assert lease.lease_id == "lease-2"


async def test_what_is_stranded_is_returned_to_the_store_with_its_lease() -> None:
    world = World(nano_usd=1000)
    world.metering.budget = 10_000
    async with working(world):
        lease = await world.leases.admit_waiting("acme", "key-1", 1, 1.0)
        assert world.leases.take(lease, 700)
        world.leases.strand(lease, lease.generation, 700)
        await eventually(lambda: lease.lease_id == "lease-2")
    (returned,) = world.metering.asked("ReturnLease")
    assert returned.lease_id == "lease-1"
    assert returned.owed_nano_usd == 700
    assert (lease.stranded, lease.held) == (0, 0)
    assert lease.money >= 1000


async def test_nothing_is_stranded_where_no_budget_is_set() -> None:
    world = World()
    lease = await world.leases.admit_waiting("acme", "key-1", 1, 1.0)
    assert world.leases.take(lease, 700)
    world.leases.strand(lease, lease.generation, 700)
    assert (lease.held, lease.stranded, lease.owed()) == (0, 0, 0)


async def test_no_budget_means_no_accounts() -> None:
    world = World()
    lease = await world.leases.admit_waiting("acme", "key-1", 1, 1.0)
    assert lease.is_unlimited_money()
    assert lease.budget_left() is None
    assert world.leases.take(lease, 10**15)


async def test_an_outage_inside_the_lease_is_not_felt_and_after_it_is_unavailable() -> None:
    world = World(request_slice=8)
    world.metering.lease_seconds = 0.3
    async with working(world):
        lease = await world.leases.admit_waiting("acme", "key-1", 1, 1.0)
        world.metering.failures["AcquireLease"] = down("metering")
        for _ in range(5):
            assert world.leases.admit("key-1", 1) is lease
        await asyncio.sleep(0.35)
        assert world.leases.admit("key-1", 1) is None
        with pytest.raises(Failure) as caught:
            await world.leases.admit_waiting("acme", "key-1", 1, 1.0)
        assert caught.value.reason is Reason.DEPENDENCY_UNAVAILABLE


async def test_who_waits_for_anothers_call_to_a_hanging_metering_is_told_that_it_is_unavailable() -> None:
    world = World()
    world.metering.delays["AcquireLease"] = 30.0
    first = asyncio.create_task(world.leases.admit_waiting("acme", "key-1", 1, 1.0))
    await eventually(lambda: world.metering.asked("AcquireLease"))
    with pytest.raises(Failure) as caught:
        await world.leases.admit_waiting("acme", "key-1", 1, 0.02)
    assert caught.value.reason is Reason.DEPENDENCY_UNAVAILABLE
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)


async def test_a_hanging_metering_costs_its_budget_once_a_second() -> None:
    world = World()
    world.metering.delays["AcquireLease"] = 30.0
    began = world.loop.time()
    with pytest.raises(Failure) as caught:
        await world.leases.admit_waiting("acme", "key-1", 1, 5.0)
    assert caught.value.reason is Reason.DEPENDENCY_UNAVAILABLE
    with pytest.raises(Failure):
        await world.leases.admit_waiting("acme", "key-1", 1, 5.0)
    assert world.loop.time() - began < 0.5


async def test_a_process_that_stood_still_asks_again_instead_of_refusing() -> None:
    world = World()
    world.metering.delays["AcquireLease"] = 0.3

    def stand_still() -> None:
        world.metering.delays.clear()
        time.sleep(0.5)

    world.loop.call_later(0.01, stand_still)
    lease = await world.leases.admit_waiting("acme", "key-1", 1, 5.0)
    assert lease.in_flight == 1
    first, second = world.metering.asked("AcquireLease")
    assert first == second
    assert world.leases.renewal_failure_count == 0


async def test_everything_is_returned_at_the_end() -> None:
    world = World(nano_usd=1000)
    world.metering.budget = 10_000
    lease = await world.leases.admit_waiting("acme", "key-1", 1, 1.0)
    assert world.leases.take(lease, 300)
    await world.leases.give_back_all(1.0)
    (returned,) = world.metering.asked("ReturnLease")
    assert (returned.lease_id, returned.owed_nano_usd) == ("lease-1", 300)


async def test_a_lease_that_could_not_be_returned_is_returned_when_metering_is_back() -> None:
    world = World(nano_usd=1000)
    world.metering.budget = 10_000
    lease = await world.leases.admit_waiting("acme", "key-1", 1, 1.0)
    assert world.leases.take(lease, 300)
    world.metering.failures["ReturnLease"] = down("metering")
    async with working(world):
        lease.used = False
        world.leases.forget("key-1")
        await eventually(lambda: world.metering.asked("ReturnLease"))
    assert not await world.releases.flush()
    del world.metering.failures["ReturnLease"]
    assert await world.releases.flush()
    asked = world.metering.asked("ReturnLease")
    assert [(request.lease_id, request.owed_nano_usd) for request in asked] == [("lease-1", 300)] * 3


async def test_a_lease_that_makes_room_for_another_one_is_returned() -> None:
    world = World(nano_usd=1000)
    world.metering.budget = 10_000
    world.leases._max_count = 1
    lease = await world.leases.admit_waiting("acme", "key-1", 1, 1.0)
    world.leases.leave(lease, 0)
    await world.leases.admit_waiting("acme", "key-2", 1, 1.0)
    await world.releases.flush()
    (returned,) = world.metering.asked("ReturnLease")
    assert (returned.lease_id, returned.owed_nano_usd) == ("lease-1", 0)


async def test_what_was_settled_here_is_owed_when_the_lease_is_returned() -> None:
    """Its settlements may still be in execution's spool: freed now, the money could be spent twice."""
    world = World(nano_usd=1000)
    world.metering.budget = 10_000
    lease = await world.leases.admit_waiting("acme", "key-1", 1, 1.0)
    assert world.leases.take(lease, 300)
    world.leases.settle(lease, lease.generation, 300, 120)
    assert world.leases.take(lease, 50)
    await world.leases.give_back_all(1.0)
    (returned,) = world.metering.asked("ReturnLease")
    assert returned.owed_nano_usd == 170


async def test_a_lease_that_is_being_renewed_is_not_let_go_as_idle() -> None:
    world = World()
    world.metering.lease_seconds = 0.05
    lease = await world.leases.admit_waiting("acme", "key-1", 1, 1.0)
    world.leases.leave(lease, 0)
    # As after a renewal in whose time nobody came.
    lease.used = False
    await asyncio.sleep(0.1)
    world.metering.lease_seconds = 60.0
    world.metering.delays["AcquireLease"] = 0.1
    renewal = asyncio.create_task(world.leases.admit_waiting("acme", "key-1", 1, 2.0))
    await eventually(lambda: len(world.metering.asked("AcquireLease")) == 2)
    # The worker's sweep, which comes once a second, in the middle of the renewal.
    world.leases._sweep()
    world.leases._work.set()
    async with working(world):
        assert await renewal is lease
    assert lease.in_flight == 1


async def test_a_revoked_keys_lease_is_returned() -> None:
    world = World()
    async with working(world):
        lease = await world.leases.admit_waiting("acme", "key-1", 1, 1.0)
        lease.used = False
        world.leases.forget("key-1")
        await eventually(lambda: world.metering.asked("ReturnLease"))
    assert not world.leases.is_alive("key-1")


async def test_slices_grow_while_they_are_used_up_quickly_within_an_eighth_of_the_limit() -> None:
    world = World(request_slice=4)
    for _ in range(30):
        world.leases.admit("key-1", 1) or await world.leases.admit_waiting("acme", "key-1", 1, 1.0)
    wanted = [wish.wanted_request_count for wish in world.metering.asked("AcquireLease")]
    assert wanted[0] == 4
    # The limit is 120.
    assert max(wanted) == 15


async def test_a_refill_for_one_limit_does_not_stop_refills_for_another() -> None:
    world = World(request_slice=8)
    async with working(world):
        lease = await world.leases.admit_waiting("acme", "key-1", 90_000, 1.0)
        world.leases.admit("key-1", 1)
        await eventually(lambda: len(world.metering.asked("AcquireLease")) == 2)
        assert lease.low_requests > 0
        assert lease.low_tokens > 0


async def test_a_burst_beyond_the_first_share_is_admitted_up_to_the_limit() -> None:
    """The first share is small, so that other keys and gateways get theirs; what waits is asked for."""
    world = World()
    world.leases._sizes = dataclasses.replace(world.leases._sizes, concurrency=8)
    world.metering.delays["AcquireLease"] = 0.01
    results = await asyncio.gather(
        *(world.leases.admit_waiting("acme", "key-1", 1, 2.0) for _ in range(60)), return_exceptions=True
    )
    refused = [result for result in results if isinstance(result, Failure)]
    assert len(results) - len(refused) == world.metering.concurrency
    assert {failure.reason for failure in refused} == {Reason.CONCURRENCY_LIMITED}
    assert len(world.metering.asked("AcquireLease")) <= 5


async def test_a_burst_during_a_renewal_that_asked_for_little_is_admitted() -> None:
    """The renewal under way was asked for when nothing ran: that it brings no more doesn't mean that there is no more."""
    world = World()
    world.leases._sizes = dataclasses.replace(world.leases._sizes, concurrency=8)
    lease = await world.leases.admit_waiting("acme", "key-1", 1, 1.0)
    world.leases.leave(lease, 0)
    world.metering.delays["AcquireLease"] = 0.02
    async with working(world):
        world.leases._want(lease)
        await eventually(lambda: lease.pending is not None)
        results = await asyncio.gather(
            *(world.leases.admit_waiting("acme", "key-1", 1, 2.0) for _ in range(8)),
            *(world.leases.admit_waiting("acme", "key-1", 1, 2.0) for _ in range(30)),
            return_exceptions=True,
        )
    assert not [result for result in results if isinstance(result, BaseException)]
    assert lease.in_flight == 38


async def test_a_share_shrinks_when_little_runs() -> None:
    world = World()
    world.leases._sizes = dataclasses.replace(world.leases._sizes, concurrency=8)
    lease = await world.leases.admit_waiting("acme", "key-1", 1, 1.0)
    assert world.metering.asked("AcquireLease")[0].wanted_concurrency == 8
    assert lease.concurrency == 8
