"""The SQLite store, its statements and its group commit as they are, in memory, and with its writer's turns given by the loop."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from typing import TypeVar

from services.metering.adapters.sqlite import SqliteStore, _guarded, _Job
from services.metering.errors import StoreUnavailable
from tests.simulation.universe import Loop

T = TypeVar("T")

_MOST_PER_COMMIT = 512
OnCommit = Callable[[], None]


def empty_database() -> sqlite3.Connection:
    """What a ledger's file is: it outlives the processes that use it."""
    connection = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA foreign_keys=ON")
    return connection


class Ledger(SqliteStore):
    """The store of one metering process."""

    def __init__(self, connection: sqlite3.Connection, loop: Loop, fails: float, on_commit: OnCommit) -> None:
        """`fails` is the probability that a commit can't be made. `on_commit` is called after each, before anybody is told of it."""
        self._write = self._read = self._report = connection
        self._migrate()
        self._head = self._last_hash()
        self._loop = loop
        self.fails = fails
        self._on_commit = on_commit
        self._waiting: list[_Job] = []
        self.charged: dict[str, int] = {}
        """What was posted by this process, by operation, without what the platform pays."""

    def close(self) -> None:
        """The file stays."""

    async def _written(self, operation: Callable[[sqlite3.Connection], T]) -> T:
        self._loop.check()
        job = _Job(operation, self._loop)
        self._waiting.append(job)
        if len(self._waiting) == 1:
            self._loop.call_later(self._loop.universe.pause(), self._turn)
        result: T = await asyncio.shield(job.future)
        return result

    async def _found(self, operation: Callable[[sqlite3.Connection], T]) -> T:
        self._loop.check()
        return await self._loop.run_in_executor(None, _guarded, operation, self._read)

    _reported = _found

    def _turn(self) -> None:
        jobs, self._waiting = self._waiting[:_MOST_PER_COMMIT], self._waiting[_MOST_PER_COMMIT:]
        if self._waiting:
            self._loop.call_later(self._loop.universe.pause(), self._turn)
        universe = self._loop.universe
        universe.point(self._loop, "before a commit")
        if universe.may(self.fails):
            universe.log(f"{self._loop.name} commit failed")
            for job in jobs:
                job.error = StoreUnavailable()
                job.resolve()
            return
        self.commit(jobs)

    def commit(self, jobs: list[_Job]) -> None:
        """Commits, and tells who waits."""
        self._commit(jobs)
        self._loop.universe.log(f"{self._loop.name} committed {len(jobs)}")
        self._on_commit()
        self._loop.universe.point(self._loop, "after a commit")
