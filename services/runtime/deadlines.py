"""Waiting no longer than until a deadline, at no cost where nothing waits.

Most handlers of a hot path end in their first step: a task, a timer or `asyncio.timeout` for each would cost more than they do. So the
first step is made at once, and only what really waits gets a timer. Written as generators, since what is under way already can't be awaited.
"""

from __future__ import annotations

import asyncio
import types
from collections.abc import Generator
from typing import Any, Final

from services.runtime.errors import deadline_exceeded


@types.coroutine
def bounded(work: Any, deadline: float, what: str) -> Generator[Any, Any, Any]:
    """Awaits `work` (a coroutine, or the step of an async generator) until `deadline`, then Failure DEADLINE_EXCEEDED."""
    try:
        pending = work.send(None)
    except StopIteration as done:
        return done.value
    return (yield from waited(work, pending, deadline, what))


def waited(work: Any, pending: Any, deadline: float, what: str) -> Generator[Any, Any, Any]:
    """Goes on with `work`, which has made its first step and waits for `pending`, until `deadline`, then Failure DEADLINE_EXCEEDED."""
    # A future knows its loop; asking which one is running costs a system call.
    task = asyncio.current_task(None if pending is None else pending.get_loop())
    assert task is not None, "a call needs a running task"
    watch = _Watch(task, deadline)
    try:
        result = yield from carried(work, pending)
    except asyncio.CancelledError:
        if watch.expired and task.uncancel() == 0:
            raise deadline_exceeded(what) from None
        raise
    except BaseException:
        if watch.expired:
            task.uncancel()
        raise
    else:
        if watch.expired and task.uncancel() > 0:
            raise asyncio.CancelledError
        return result
    finally:
        watch.end()


_NEAR_SECONDS: Final = 1.0
_FAR_SECONDS: Final = 600.0
"""A slot stays until its time. Were there no end to them, callers with ever other deadlines could have any number made, for years."""
_SLOTS_PER_SECOND: Final = 32


class _Watch:
    """Cancels a task at a deadline. Deadlines from a second to some minutes away may be kept up to 1/32 s late: then those of many calls share
    a timer of the loop, and a call costs it nothing; to set and cancel a timer of its own takes longer than many a handler.
    """

    __slots__ = ("_slot", "_timer", "deadline", "expired", "task")

    def __init__(self, task: asyncio.Task[Any], deadline: float) -> None:
        self.task = task
        self.deadline = deadline
        self._timer: asyncio.TimerHandle | None = None
        self._slot: dict[_Watch, None] | None = None
        self.expired = False
        loop = task.get_loop()
        if not _NEAR_SECONDS <= deadline - loop.time() <= _FAR_SECONDS:
            self._timer = loop.call_at(deadline, self.expire)
        else:
            slots = _latest if _latest.loop is loop else _slots_of(loop)
            self.move(slots.at(deadline))

    def move(self, slot: dict[_Watch, None]) -> None:
        """Puts it into a slot, which expires it."""
        self._slot = slot
        slot[self] = None

    def expire(self) -> None:
        """The time is over."""
        self.expired = True
        self.task.cancel()

    def end(self) -> None:
        """It is no longer waited for."""
        if self._slot is not None:
            self._slot.pop(self, None)
        elif self._timer is not None:
            self._timer.cancel()


class _Slots:
    """The watches of a loop by the slot of time in which they expire."""

    def __init__(self, loop: asyncio.AbstractEventLoop | None) -> None:
        self.loop = loop
        self._slots: dict[int, dict[_Watch, None]] = {}

    def at(self, deadline: float) -> dict[_Watch, None]:
        """The slot that ends at or just after `deadline`."""
        return self._numbered(int(deadline * _SLOTS_PER_SECOND) + 1)

    def _numbered(self, number: int) -> dict[_Watch, None]:
        slot = self._slots.get(number)
        if slot is None:
            assert self.loop is not None, "made for a loop"
            slot = self._slots[number] = {}
            self.loop.call_at(number / _SLOTS_PER_SECOND, self._end, number)
        return slot

    def _end(self, number: int) -> None:
        watches = self._slots.pop(number)
        tasks = set()
        for watch in sorted(watches, key=_deadline):
            if watch.task in tasks:
                # Of a call around that call: ended at once, too, it would make the inner one's end look like a cancellation.
                watch.move(self._numbered(number + 1))
            else:
                tasks.add(watch.task)
                watch.expire()


def _deadline(watch: _Watch) -> float:
    return watch.deadline


_latest = _Slots(None)


def _slots_of(loop: asyncio.AbstractEventLoop) -> _Slots:
    # A process has one loop, tests have one after the other; those that were used before end by their timers all the same.
    global _latest  # noqa: PLW0603
    slots = _latest = _Slots(loop)
    return slots


@types.coroutine
def carried(work: Any, pending: Any) -> Generator[Any, Any, Any]:
    """Runs `work` on from its first wait to its end: what it yields goes to the loop, and what the loop throws back to it.

    The loop sends nothing but None, so after the first wait the interpreter can do it by itself.
    """
    try:
        yield pending
    except GeneratorExit:
        work.close()
        raise
    except BaseException as thrown:  # noqa: BLE001  # handed on, whatever it is
        try:
            pending = work.throw(thrown)
        except StopIteration as done:
            return done.value
        return (yield from carried(work, pending))
    return (yield from work)
