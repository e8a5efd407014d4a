"""Counts of prompts that were sent uncounted, for attempts that must be charged without their provider's usage."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, Final

from services.runtime.errors import Failure
from sluice.inference.v1 import conversation_pb2
from sluice.tokenization.v1 import tokenization_service_pb2

if TYPE_CHECKING:
    from sluice.tokenization.v1.tokenization_service_pb2_grpc import TokenizationServiceAsyncStub

_MOST_AT_ONCE: Final = 1000
"""Prompts that wait for their count: each is kept in memory meanwhile."""
_PAUSE_SECONDS: Final = 1.0
"""Without asking, after tokenization didn't answer."""


class Counts:
    """Asks tokenization, where it can be asked; and runs what waits for it when its caller is gone."""

    def __init__(self, stub: TokenizationServiceAsyncStub, clock: Callable[[], float], *, seconds: float) -> None:
        self._call = stub.Count
        self._clock = clock
        self._seconds = seconds
        self._asking = 0
        self._not_before = 0.0
        self._tasks: set[asyncio.Task[None]] = set()
        self.failure_count = 0
        """Attempts that were charged by the size of their prompt."""

    async def count(self, model: str, conversation: conversation_pb2.Conversation) -> int | None:
        """Tokens of a prompt for a model of the catalogue; None: that can't be had now."""
        if self._asking >= _MOST_AT_ONCE or self._clock() < self._not_before:
            self.failure_count += 1
            return None
        self._asking += 1
        try:
            response = await self._call(
                tokenization_service_pb2.CountRequest(models=[model], conversation=conversation), timeout=self._seconds
            )
        except Failure:
            self._not_before = self._clock() + _PAUSE_SECONDS
            self.failure_count += 1
            return None
        finally:
            self._asking -= 1
        return next((count.token_count for count in response.counts), None)

    def later(self, work: Coroutine[Any, Any, None]) -> None:
        """Runs `work`, for which nobody waits."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def wait_idle(self) -> None:
        """Waits until nothing is left to run."""
        while self._tasks:
            await asyncio.wait(self._tasks)
