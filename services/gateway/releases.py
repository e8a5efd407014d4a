"""Money that nobody here needs any more, freed behind the path: holds of operations that spent nothing, and leases."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final

from services.gateway.ports import OUTAGES, Metering
from services.runtime.errors import Failure, Reason

_FIRST_DELAY: Final = 0.1
_LONGEST_DELAY: Final = 2.0
_ON_ITS_WAY: Final = 2.0
"""Seconds after which a request whose caller has given up was carried out or never is."""

_Release = Callable[[], Awaitable[None]]


class Releases:
    """A bounded queue. While metering is away, what is in it waits. What doesn't fit, and what metering refuses, is freed by the store when
    its time is over.
    """

    def __init__(self, metering: Metering, *, max_count: int, call_seconds: float) -> None:
        self._metering = metering
        self._max_count = max_count
        self._call_seconds = call_seconds
        self._queue: deque[_Release] = deque()
        self._work = asyncio.Event()
        self.dropped_count = 0

    def void(self, hold_id: str, *, may_have_run: bool = False) -> None:
        """Queues a hold to be freed: at once, or when what may have run for it is settled. One that was never made is no error."""
        self._add(partial(self._metering.void, hold_id, may_have_run=may_have_run, timeout=self._call_seconds))

    def void_lost(self, hold_id: str) -> None:
        """As `void`, of a hold whose answer was lost: where there is none yet its request may still be on its way, and it is looked for
        once more.
        """
        self._add(partial(self._void_lost, hold_id))

    async def _void_lost(self, hold_id: str) -> None:
        try:
            await self._metering.void(hold_id, may_have_run=False, timeout=self._call_seconds)
        except Failure as failure:
            if failure.reason is not Reason.RESOURCE_NOT_FOUND:
                raise
            asyncio.get_running_loop().call_later(_ON_ITS_WAY, self.void, hold_id)

    def give_back(self, tenant_id: str, lease_id: str, owed_nano_usd: int) -> None:
        """Queues a lease to be returned; see Metering.give_back."""
        self._add(partial(self._metering.give_back, tenant_id, lease_id, owed_nano_usd, timeout=self._call_seconds))

    async def release_forever(self) -> None:
        """The worker."""
        delay = _FIRST_DELAY
        while True:
            await self._work.wait()
            if await self.flush():
                delay = _FIRST_DELAY
            else:
                await asyncio.sleep(delay)
                delay = min(_LONGEST_DELAY, 2 * delay)

    async def flush(self) -> bool:
        """Frees what is queued; False: metering can't be asked at the moment."""
        while self._queue:
            release = self._queue.popleft()
            try:
                await release()
            except Failure as failure:
                if failure.reason in OUTAGES:
                    self._queue.appendleft(release)
                    return False
                if failure.reason is not Reason.RESOURCE_NOT_FOUND:
                    self.dropped_count += 1
            except asyncio.CancelledError:
                self._queue.appendleft(release)
                raise
        self._work.clear()
        return True

    def _add(self, release: _Release) -> None:
        if len(self._queue) >= self._max_count:
            self.dropped_count += 1
            return
        self._queue.append(release)
        self._work.set()
