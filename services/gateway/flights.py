"""One call for many that want the same."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from services.runtime.errors import Failure, Reason, deadline_exceeded

Key = TypeVar("Key")
Value = TypeVar("Value")


class Flights(Generic[Key, Value]):
    """Calls under way by key. The first to ask makes the call itself; the others wait for what it gets.

    No task is made: the first caller's own cancellation or deadline ends only its own call, and the next in line makes a new one.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._running: dict[Key, asyncio.Future[Value]] = {}

    def is_running(self, key: Key) -> bool:
        """Whether somebody asks already."""
        return key in self._running

    async def run(self, key: Key, call: Callable[[], Awaitable[Value]], timeout: float) -> Value:
        """What `call` returns or the Failure it raises. Waits at most `timeout` seconds for another's call."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        while (running := self._running.get(key)) is not None:
            await asyncio.wait((running,), timeout=max(0.0, deadline - loop.time()))
            if not running.done():
                raise deadline_exceeded(self._what)
            if running.cancelled():
                continue
            failure = running.exception()
            if isinstance(failure, Failure) and failure.reason is Reason.DEADLINE_EXCEEDED and loop.time() < deadline:
                continue
            return running.result()
        mine: asyncio.Future[Value] = loop.create_future()
        self._running[key] = mine
        try:
            value = await call()
        except Failure as failure:
            del self._running[key]
            mine.set_exception(failure)
            mine.exception()  # Read once: with nobody waiting, the loop would report it as lost.
            raise
        except BaseException:
            del self._running[key]
            mine.cancel()
            raise
        del self._running[key]
        mine.set_result(value)
        return value
