"""Bugs to plant: each is one that a product like this has had somewhere. A simulation that doesn't find them proves nothing."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Final
from unittest import mock

from services.execution.spool import Begun, Spool
from services.gateway import core
from services.gateway.leases import Lease, Leases
from services.gateway.releases import Releases
from services.metering.adapters import sqlite
from services.metering.adapters.sqlite import SqliteStore, _Job
from services.runtime.errors import Failure
from tests.simulation.nodes import Execution
from tests.simulation.store import Ledger
from tests.simulation.world import World

Plant = Callable[[World], contextlib.AbstractContextManager[Any]]


def confirmed_before_the_commit(world: World) -> contextlib.AbstractContextManager[Any]:
    """The ledger tells who waits that it is written, and writes it a little later."""
    real = Ledger.commit

    def commit(self: Ledger, jobs: list[_Job]) -> None:
        done: list[_Job] = []
        for job in jobs:
            # What it would say is found out, and undone.
            self._write.execute("BEGIN")
            head = self._head
            self._one(self._write, job)
            self._head = head
            self._write.execute("ROLLBACK")
            job.resolve()
            done.append(_Job(job.operation, job.loop))
        self._loop.call_later(0.02, real, self, done)

    return mock.patch.object(Ledger, "commit", commit)


def holds_are_not_voided(world: World) -> contextlib.AbstractContextManager[Any]:
    """A hold of which nothing was spent stays until its time is over."""
    return mock.patch.object(Releases, "void", return_value=None)


def spool_dropped_before_it_is_posted(world: World) -> contextlib.AbstractContextManager[Any]:
    """A file of the spool goes when its settlements are handed to the call, not when the ledger has them."""
    real = Spool._post_some

    async def post_some(self: Spool) -> None:
        for path in [segment.path for segment in self._segments[:-1]]:
            path.unlink(missing_ok=True)
        await real(self)

    return mock.patch.object(Spool, "_post_some", post_some)


def never_synced(world: World) -> contextlib.AbstractContextManager[Any]:
    """The spool is written and never forced to the disk."""
    return mock.patch.object(Spool, "_sync", return_value=None)


def sent_before_it_is_recorded(world: World) -> contextlib.AbstractContextManager[Any]:
    """The provider is called before the attempt's start is on disk."""

    def gate(self: Begun) -> None:
        self.passed = True

    return mock.patch.object(Begun, "__call__", gate)


def answered_before_it_is_recorded(world: World) -> contextlib.AbstractContextManager[Any]:
    """The last byte leaves before the settlement is on disk."""
    real = Execution.start

    async def start(self: Execution) -> None:
        await real(self)
        self.node.barrier = lambda: None

    def soon(self: Spool, frame: bytes, record: Any, begun: Begun | None) -> None:
        self._waiting.append((frame, record, begun))
        asyncio.get_running_loop().call_later(0.002, self.write)

    return _both(mock.patch.object(Execution, "start", start), mock.patch.object(Spool, "_soon", soon))


def posted_twice(world: World) -> contextlib.AbstractContextManager[Any]:
    """A settlement that comes again moves the balances again."""
    real = SqliteStore._append

    def append(self: SqliteStore, c: Any, settlements: Any, known: set[str]) -> Any:
        for settlement in settlements:
            if settlement.entry.attempt_id in known and settlement.entry.amount:
                entry = settlement.entry
                c.execute("UPDATE accounts SET spent = spent + ? WHERE name = ?", (entry.amount, f"key/{entry.key_id}"))
        return real(self, c, settlements, known)

    return mock.patch.object(SqliteStore, "_append", append)


def unknown_cost_is_none(world: World) -> contextlib.AbstractContextManager[Any]:
    """A call that was cut off is taken to have cost nothing, and what it held is given to the next one."""

    def settled_cost(failure: Failure) -> int | None:
        return 0

    return mock.patch.object(core, "settled_cost", settled_cost)


def cancelled_is_free(world: World) -> contextlib.AbstractContextManager[Any]:
    """Who holds money and goes away gives it back, though the provider works on."""

    def strand(self: Leases, lease: Lease, generation: int, amount: int) -> None:
        self.settle(lease, generation, amount, 0)

    return mock.patch.object(Leases, "strand", strand)


def check_then_act(world: World) -> contextlib.AbstractContextManager[Any]:
    """Budgets are looked at and not enforced by the statement that reserves."""
    return mock.patch.object(
        sqlite, "_HOLD_ALL", "UPDATE accounts SET held = held + ?1 WHERE name IN (?2, ?3, ?4) AND ?5 IS NOT NULL"
    )


def lost_attempts_are_forgotten(world: World) -> contextlib.AbstractContextManager[Any]:
    """A start without its end is dropped at the restart."""
    real = Spool.open

    def opened(self: Spool, parse: Any, lost: Any) -> int:
        count = real(self, parse, lost)
        kept = [(record, segment) for record, segment in self._unposted if not record.payer]
        self._unposted.clear()
        self._unposted.extend(kept)
        return count

    return mock.patch.object(Spool, "open", opened)


def lost_attempts_are_charged(world: World) -> contextlib.AbstractContextManager[Any]:
    """What a crash of ours cost is charged to the tenant."""
    real = Spool.open

    def opened(self: Spool, parse: Any, lost: Any) -> int:
        def charged(record: Any) -> Any:
            settled = lost(record)
            settled.payer = 0
            return settled

        return real(self, parse, charged)

    return mock.patch.object(Spool, "open", opened)


def each_run_is_charged(world: World) -> contextlib.AbstractContextManager[Any]:
    """A request that is run again, since its answer was lost, is charged again."""
    return mock.patch.object(sqlite, "charged_once", lambda settlement, owner: settlement.entry)


@contextlib.contextmanager
def _both(*patches: contextlib.AbstractContextManager[Any]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield


MUTATIONS: Final[tuple[Plant, ...]] = (
    confirmed_before_the_commit,
    holds_are_not_voided,
    spool_dropped_before_it_is_posted,
    never_synced,
    sent_before_it_is_recorded,
    answered_before_it_is_recorded,
    posted_twice,
    unknown_cost_is_none,
    cancelled_is_free,
    check_then_act,
    lost_attempts_are_forgotten,
    lost_attempts_are_charged,
    each_run_is_charged,
)
