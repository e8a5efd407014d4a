"""Free probes of every provider, and what routing is told: attempts that ended, breakers, probes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from services.execution.provider import Provider
from services.execution.targets import Probe, Targets
from services.runtime.errors import Failure

_AT_ONCE = 8


class Prober:
    """Asks every provider now and then whether it is there, by a call that costs nothing."""

    def __init__(self, targets: Targets, *, interval: float, timeout: float) -> None:
        self._targets = targets
        self._interval = interval
        self._timeout = timeout

    async def run(self) -> None:
        """Probes until cancelled."""
        while True:
            await self.round()
            await asyncio.sleep(self._interval)

    async def round(self) -> None:
        """One probe of each provider."""
        turn = asyncio.Semaphore(_AT_ONCE)

        async def one(name: str, provider: Provider) -> None:
            async with turn:
                self._targets.probes[name] = await self._probe(provider)

        async with asyncio.TaskGroup() as group:
            for name, provider in list(self._targets.providers.items()):
                group.create_task(one(name, provider), name=f"probe {name}")

    async def _probe(self, provider: Provider) -> Probe:
        began = time.monotonic()
        probe = Probe(time=time.time())
        try:
            async with asyncio.timeout(self._timeout):
                await provider.probe(asyncio.get_running_loop().time() + self._timeout)
            probe.healthy = True
        except Failure as failure:
            probe.healthy = False
            probe.detail = f"{failure.reason.value}: {failure.message}"
        except TimeoutError:
            probe.healthy = False
            probe.detail = f"no answer within {self._timeout:g} s"
        probe.seconds = time.monotonic() - began
        return probe


async def every(seconds: float, what: Callable[[], Awaitable[None]]) -> None:
    """Runs `what` again and again; a Failure of it is of no consequence here."""
    while True:
        await asyncio.sleep(seconds)
        try:
            await what()
        except Failure:
            continue
