"""Holds and leases that are given back behind the path."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from services.gateway import releases
from services.runtime.errors import Failure, Reason
from tests.unit.gateway.fakes import World, down
from tests.unit.gateway.test_leases import eventually, running


async def test_holds_are_freed_and_the_queue_is_bounded() -> None:
    world = World()
    for number in range(12):
        world.releases.void(f"hold-{number}", may_have_run=number == 3)
    assert world.releases.dropped_count == 2
    async with running(world.releases.release_forever()):
        await eventually(lambda: len(world.metering.asked("VoidHold")) == 10)
    asked = world.metering.asked("VoidHold")
    assert [request.hold_id for request in asked] == [f"hold-{number}" for number in range(10)]
    assert [request.hold_id for request in asked if request.may_have_run] == ["hold-3"]


async def test_what_cannot_be_freed_waits_until_metering_is_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(releases, "_FIRST_DELAY", 0.01)
    world = World()
    world.metering.failures["VoidHold"] = down("metering")
    world.releases.void("hold-1")
    world.releases.give_back("acme", "lease-1", 7)
    async with running(world.releases.release_forever()):
        await eventually(lambda: len(world.metering.asked("VoidHold")) > 2)
        del world.metering.failures["VoidHold"]
        await eventually(lambda: world.metering.asked("ReturnLease"))
    (returned,) = world.metering.asked("ReturnLease")
    assert (returned.lease_id, returned.owed_nano_usd) == ("lease-1", 7)
    assert world.releases.dropped_count == 0


async def test_what_metering_refuses_is_not_asked_again() -> None:
    world = World()
    world.metering.failures["VoidHold"] = Failure(Reason.PERMISSION_DENIED, "no")
    world.releases.void("hold-1")
    assert await world.releases.flush()
    assert (len(world.metering.asked("VoidHold")), world.releases.dropped_count) == (1, 1)
    # A hold that was never made is what was wanted.
    world.metering.failures["VoidHold"] = Failure(Reason.RESOURCE_NOT_FOUND, "there is no holds/hold-2")
    world.releases.void("hold-2")
    assert await world.releases.flush()
    assert (len(world.metering.asked("VoidHold")), world.releases.dropped_count) == (2, 1)


async def test_a_lost_hold_that_is_not_there_yet_is_looked_for_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(releases, "_ON_ITS_WAY", 0.02)
    world = World()
    async with running(world.releases.release_forever()):
        world.releases.void_lost("hold-1")
        await eventually(lambda: len(world.metering.asked("VoidHold")) == 1)
        await asyncio.sleep(0.1)
        assert len(world.metering.asked("VoidHold")) == 1
        world.metering.failures["VoidHold"] = Failure(Reason.RESOURCE_NOT_FOUND, "there is no holds/hold-2")
        world.releases.void_lost("hold-2")
        await eventually(lambda: len(world.metering.asked("VoidHold")) == 3)
        await asyncio.sleep(0.1)
    assert [request.hold_id for request in world.metering.asked("VoidHold")] == ["hold-1", "hold-2", "hold-2"]
    assert world.releases.dropped_count == 0


async def test_a_release_that_is_cut_off_is_not_lost() -> None:
    world = World()
    world.metering.delays["VoidHold"] = 60.0
    world.releases.void("hold-1")
    flush = asyncio.create_task(world.releases.flush())
    await eventually(lambda: world.metering.asked("VoidHold"))
    flush.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await flush
    world.metering.delays.clear()
    assert await world.releases.flush()
    assert len(world.metering.asked("VoidHold")) == 2
