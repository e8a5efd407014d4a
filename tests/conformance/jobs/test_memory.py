"""The stand-in of the unit tests does what the engine does."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager

from tests.conformance.jobs.suite import CAPACITY, QueuesSuite, Store, TableSuite
from tests.unit.batching.memory import MemoryQueues, MemoryTable


@contextlib.asynccontextmanager
async def _opened() -> AsyncIterator[Store]:
    yield Store(MemoryTable(), MemoryQueues(CAPACITY))


class TestMemoryTable(TableSuite):
    def open(self) -> AbstractAsyncContextManager[Store]:
        return _opened()


class TestMemoryQueues(QueuesSuite):
    def open(self) -> AbstractAsyncContextManager[Store]:
        return _opened()
