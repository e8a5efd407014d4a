"""Deadlines that are near, and those that share a timer."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from services.runtime import deadlines
from services.runtime.deadlines import bounded
from services.runtime.errors import Failure, Reason


async def after(seconds: float) -> str:
    await asyncio.sleep(seconds)
    return "done"


def within(work: Coroutine[Any, Any, Any], seconds: float) -> asyncio.Task[Any]:
    async def run() -> Any:
        return await bounded(work, asyncio.get_running_loop().time() + seconds, "it")

    return asyncio.create_task(run())


@pytest.mark.parametrize("seconds", [0.05, 1.05])
async def test_what_waits_ends_at_its_deadline_and_not_before(seconds: float) -> None:
    """The second is far enough away to share a timer."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    quick = [within(after(seconds / 3), seconds) for _ in range(20)]
    slow = [within(after(60), seconds) for _ in range(20)]
    ends: list[float] = []
    for task in slow:
        task.add_done_callback(lambda _: ends.append(loop.time() - began))
    assert await asyncio.gather(*quick) == ["done"] * 20
    failures = await asyncio.gather(*slow, return_exceptions=True)
    assert [failure.reason for failure in failures if isinstance(failure, Failure)] == [Reason.DEADLINE_EXCEEDED] * 20
    assert min(ends) >= seconds - 0.002
    assert max(ends) < seconds + 0.2
    assert all(not task.cancelling() for task in slow)


@pytest.mark.parametrize("is_first_step", [True, False])
async def test_of_two_deadlines_that_share_a_timer_the_inner_one_is_told_apart_from_a_cancellation(is_first_step: bool) -> None:
    """In its first step the inner call waits before the outer one does, later after it."""
    loop = asyncio.get_running_loop()
    # The middle of a slot.
    inner = (int(loop.time() * 32) + 1.5) / 32 + 1.0
    seen: list[Reason] = []

    async def work() -> None:
        if not is_first_step:
            await asyncio.sleep(0.01)
        try:
            await bounded(after(60), inner, "inner")
        except Failure as failure:
            seen.append(failure.reason)
        await asyncio.sleep(60)

    with pytest.raises(Failure) as caught:
        await bounded(work(), inner + 0.005, "outer")
    assert seen == [Reason.DEADLINE_EXCEEDED]
    assert caught.value.reason is Reason.DEADLINE_EXCEEDED
    assert loop.time() < inner + 0.3
    task = asyncio.current_task()
    assert task is not None
    assert not task.cancelling()


async def test_far_deadlines_of_one_moment_share_a_timer_and_leave_nothing_behind() -> None:
    tasks = [within(after(60), 30.0) for _ in range(100)]
    await asyncio.sleep(0)
    slots = deadlines._latest._slots
    assert len(slots) <= 2
    assert sum(map(len, slots.values())) == 100
    for task in tasks:
        task.cancel()
    assert all(isinstance(end, asyncio.CancelledError) for end in await asyncio.gather(*tasks, return_exceptions=True))
    assert sum(map(len, slots.values())) == 0


async def test_deadlines_that_are_very_far_make_no_slots() -> None:
    """A slot stays until its time, and callers of gRPC choose theirs."""
    tasks = [within(after(60), 10_000.0 * (number + 1)) for number in range(100)]
    await asyncio.sleep(0)
    latest = deadlines._latest
    assert latest.loop is not asyncio.get_running_loop() or not latest._slots
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_what_ends_at_once_needs_no_watch() -> None:
    async def nothing() -> int:
        return 7

    assert await within(nothing(), 30.0) == 7
    assert deadlines._latest.loop is not asyncio.get_running_loop() or not any(deadlines._latest._slots.values())


async def test_who_is_cancelled_from_outside_stays_cancelled() -> None:
    for seconds in (0.5, 30.0):
        task = within(after(60), seconds)
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_what_swallows_its_cancellation_ends_as_it_likes() -> None:
    async def stubborn() -> str:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            await asyncio.sleep(0.01)
        return "mine"

    assert await within(stubborn(), 0.02) == "mine"
