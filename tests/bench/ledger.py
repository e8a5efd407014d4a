"""Holds and settlements a second on each ledger store, every one durable, against bare transactions on the same store in the same run."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import statistics
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from services.metering.accounts import Limits, Tenant
from services.metering.adapters import postgres as postgres_store
from services.metering.adapters import sqlite
from services.metering.ports import Store
from tests import postgres
from tests.conformance.ledger.examples import ACME, HOLDER, HOUR, NOW, PAYER, key, settlement

_CALLERS: Final = 256
_GROUP: Final = 64
"""Pairs that the reference commits together."""
_BUDGET: Final = 1 << 60
_MARK: Final = 10_000


@dataclass(frozen=True, slots=True)
class Plan:
    """How long to measure."""

    rounds: int
    pairs: int
    """A hold and the settlement that ends it, in a round."""
    lone: int
    """Pairs of one caller alone, for the latency that a request sees when nobody else is there."""


FULL: Final = Plan(rounds=3, pairs=20_000, lone=500)
SHORT: Final = Plan(rounds=1, pairs=1500, lone=50)


@dataclass(frozen=True, slots=True)
class Round:
    """One round. Rates are pairs a second, latencies seconds."""

    rate: float
    reference_rate: float
    cpu_seconds: float
    """Of a pair: this process's, and the server's where there is one."""
    hold_seconds: Sequence[float]
    """Sorted, under load."""
    lone_hold_seconds: Sequence[float]
    """Sorted, of one caller alone."""


@dataclass(slots=True)
class Figure:
    """What was measured of a store."""

    name: str
    mark: float | None
    """Pairs a second that are promised; None: it is said and not promised."""
    rounds: list[Round] = field(default_factory=list)

    def spread(self, of: Callable[[Round], float]) -> tuple[float, float, float]:
        """Minimum, median, maximum."""
        values = [of(one) for one in self.rounds]
        return min(values), statistics.median(values), max(values)

    @property
    def verdict(self) -> str:
        """`ok`, `short`, or `-` where there is no mark."""
        if self.mark is None:
            return "-"
        return "ok" if self.spread(lambda one: one.rate)[1] >= self.mark else "short"


def percentile(ordered: Sequence[float], share: float) -> float:
    """Of sorted values."""
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


class Place(ABC):
    """Where the stores of a bench keep their rows."""

    name: str
    mark: float | None

    @abstractmethod
    def open(self) -> AbstractAsyncContextManager[Store]:
        """An empty store."""

    @abstractmethod
    async def bare(self, pairs: int) -> None:
        """As many pairs of the least that a ledger must write, `_GROUP` to a durable transaction, without any rule of money."""

    def server_cpu(self) -> float:
        """CPU seconds that a server has used."""
        return 0.0


class _Sqlite(Place):
    name = "ledger.sqlite"
    mark = _MARK

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._count = 0

    def _next(self) -> Path:
        self._count += 1
        return self._directory / str(self._count)

    def open(self) -> AbstractAsyncContextManager[Store]:
        return sqlite.open_store(self._next())

    async def bare(self, pairs: int) -> None:
        path = self._next()
        await asyncio.to_thread(_bare_sqlite, path, pairs)


def _bare_sqlite(path: Path, pairs: int) -> None:
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as c:
        c.execute("PRAGMA journal_mode=WAL")
        c.execute("PRAGMA synchronous=FULL")
        c.execute("CREATE TABLE accounts (name TEXT PRIMARY KEY, spent INTEGER, held INTEGER) WITHOUT ROWID")
        c.execute("CREATE TABLE journal (sequence INTEGER PRIMARY KEY, attempt_id TEXT UNIQUE, amount INTEGER, body TEXT)")
        c.execute("INSERT INTO accounts VALUES ('a', 0, 0)")
        for start in range(0, pairs, _GROUP):
            for statement in (
                "UPDATE accounts SET held = held + 100 WHERE name = 'a'",
                "UPDATE accounts SET held = held - 100, spent = spent + 50 WHERE name = 'a'",
            ):
                c.execute("BEGIN IMMEDIATE")
                for number in range(start, min(start + _GROUP, pairs)):
                    c.execute(statement)
                    if "spent" in statement:
                        c.execute("INSERT INTO journal VALUES (NULL, ?, 50, ?)", (f"op-{number}/1", "x" * 200))
                c.execute("COMMIT")


class _Postgres(Place):
    name = "ledger.postgres"
    mark = None

    def __init__(self, server: postgres.Server) -> None:
        self._server = server

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[Store]:
        url = await self._server.new_database()
        async with postgres_store.open_store(postgres_store.url_of(url)) as store:
            yield store

    async def bare(self, pairs: int) -> None:
        async with postgres.connected(await self._server.new_database()) as c:
            await c.execute("CREATE TABLE accounts (name text PRIMARY KEY, spent bigint, held bigint)")
            await c.execute(
                "CREATE TABLE journal (sequence bigserial PRIMARY KEY, attempt_id text UNIQUE, amount bigint, body text)"
            )
            await c.execute("INSERT INTO accounts VALUES ('a', 0, 0)")
            for start in range(0, pairs, _GROUP):
                many = [(f"op-{number}/1", "x" * 200) for number in range(start, min(start + _GROUP, pairs))]
                async with c.transaction():
                    await c.executemany("UPDATE accounts SET held = held + $1 WHERE name = 'a'", [(100,)] * len(many))
                async with c.transaction():
                    await c.executemany(
                        "UPDATE accounts SET held = held - $1, spent = spent + 50 WHERE name = 'a'", [(100,)] * len(many)
                    )
                    await c.executemany("INSERT INTO journal (attempt_id, amount, body) VALUES ($1, 50, $2)", many)

    def server_cpu(self) -> float:
        return self._server.cpu_seconds()


NAMES: Final = (_Sqlite.name, _Postgres.name)


@contextlib.contextmanager
def places() -> Iterator[list[Place]]:
    """Each store there is."""
    with tempfile.TemporaryDirectory(prefix="sluice-bench-") as name, postgres.server() as server:
        yield [_Sqlite(Path(name)), _Postgres(server)]


async def _pairs(store: Store, pairs: int, callers: int, prefix: str) -> list[float]:
    """Times of the holds, sorted."""
    numbers = iter(range(pairs))
    seconds: list[float] = []

    async def call() -> None:
        for number in numbers:
            began = time.perf_counter()
            hold = await store.hold(f"{prefix}-{number}", PAYER, 100, 0, NOW + HOUR, HOLDER)
            seconds.append(time.perf_counter() - began)
            await store.post([settlement(f"{prefix}-{number}/1", amount=50, hold_id=hold.id, final=True)])

    await asyncio.gather(*(call() for _ in range(callers)))
    return sorted(seconds)


async def measure_round(place: Place, plan: Plan) -> Round:
    """One round on an empty store, and of the reference. AssertionError when the books are wrong afterwards."""
    async with place.open() as store:
        await store.create_tenant(Tenant(ACME, "", Limits(budget_nano_usd=_BUDGET), NOW), "")
        await store.create_key(key())
        lone = await _pairs(store, plan.lone, 1, "lone")
        began, cpu = time.perf_counter(), time.process_time() + place.server_cpu()
        holds = await _pairs(store, plan.pairs, _CALLERS, "op")
        took = time.perf_counter() - began
        used = time.process_time() + place.server_cpu() - cpu
        tenant = await store.tenant(ACME)
        assert tenant is not None
        done = plan.pairs + plan.lone
        assert (tenant.balance.spent_nano_usd, tenant.balance.held_nano_usd) == (50 * done, 0)
        verdict = await store.verify()
        assert (verdict.entries, verdict.problems) == (done, ())
    began = time.perf_counter()
    await place.bare(plan.pairs)
    bare = time.perf_counter() - began
    return Round(plan.pairs / took, plan.pairs / bare, used / plan.pairs, holds, lone)
