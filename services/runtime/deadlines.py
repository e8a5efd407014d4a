"""Waiting no longer than until a deadline, at no cost where nothing waits.

Most handlers of a hot path end in their first step: a task, a timer or `asyncio.timeout` for each would cost more than they do. So the
first step is made at once, and only what really waits gets a timer. Written as generators, since what is under way already can't be awaited.
"""

from __future__ import annotations

import asyncio
import types
from collections.abc import Generator
from typing import Any

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
    loop = asyncio.get_running_loop()
    task = asyncio.current_task(loop)
    assert task is not None, "a call needs a running task"
    expired = False

    def expire() -> None:
        nonlocal expired
        expired = True
        task.cancel()

    timer = loop.call_at(deadline, expire)
    try:
        result = yield from carried(work, pending)
    except asyncio.CancelledError:
        if expired and task.uncancel() == 0:
            raise deadline_exceeded(what) from None
        raise
    except BaseException:
        if expired:
            task.uncancel()
        raise
    else:
        if expired and task.uncancel() > 0:
            raise asyncio.CancelledError
        return result
    finally:
        timer.cancel()


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
