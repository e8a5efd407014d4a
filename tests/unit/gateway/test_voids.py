"""Holds that are freed behind the path."""

from __future__ import annotations

import asyncio
import contextlib

from tests.unit.gateway.fakes import World, down


async def test_holds_are_freed_and_the_queue_is_bounded() -> None:
    world = World()
    for number in range(12):
        world.voids.add(f"hold-{number}")
    assert world.voids.dropped_count == 2
    task = asyncio.create_task(world.voids.void_forever())
    await asyncio.sleep(0.05)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    assert len(world.metering.asked("VoidHold")) == 10


async def test_what_cannot_be_freed_is_left_to_expire() -> None:
    world = World()
    world.metering.failures["VoidHold"] = down("metering")
    world.voids.add("hold-1")
    await world.voids.flush()
    assert world.voids.dropped_count == 1
