"""Frees holds whose operations made no attempt that costs anything, behind the path."""

from __future__ import annotations

import asyncio
from collections import deque

from services.gateway.ports import Metering
from services.runtime.errors import Failure


class Voids:
    """A bounded queue of holds to free. What is dropped or can't be freed expires in the store by itself."""

    def __init__(self, metering: Metering, *, max_count: int, call_seconds: float) -> None:
        self._metering = metering
        self._max_count = max_count
        self._call_seconds = call_seconds
        self._queue: deque[str] = deque()
        self._work = asyncio.Event()
        self.dropped_count = 0

    def add(self, hold_id: str) -> None:
        """Queues a hold."""
        if len(self._queue) >= self._max_count:
            self.dropped_count += 1
            return
        self._queue.append(hold_id)
        self._work.set()

    async def void_forever(self) -> None:
        """The worker."""
        while True:
            await self._work.wait()
            self._work.clear()
            await self.flush()

    async def flush(self) -> None:
        """Frees what is queued."""
        while self._queue:
            try:
                await self._metering.void(self._queue.popleft(), timeout=self._call_seconds)
            except Failure:
                self.dropped_count += 1
