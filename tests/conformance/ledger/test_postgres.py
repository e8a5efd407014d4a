from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager

import asyncpg
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from services.metering.accounts import Balance, Limits, Payer, Tenant
from services.metering.adapters.postgres import PostgresStore, open_store, url_of
from services.metering.adapters.postgres_tables import METADATA
from services.metering.errors import BudgetExhausted, StoreUnavailable
from services.metering.ledger import PostState
from services.metering.ports import UsageFilter
from tests import postgres
from tests.conformance.ledger.examples import HOLDER, HOUR, NOW, PAYER, key, settlement
from tests.conformance.ledger.machine import LedgerMachine
from tests.conformance.ledger.suite import ROOT, Database, LedgerSuite, assert_balances, balances, prepare

_TABLES = ("tenants", "projects", "keys", "accounts", "holds", "leases", "journal")


class PostgresDatabase:
    """A database with a ledger."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.writer: Sequence[str] = ("postgres", url)

    def open(self) -> AbstractAsyncContextManager[PostgresStore]:
        return open_store(url_of(self.url))

    async def refuses(self, statement: str) -> bool:
        async with postgres.connected(self.url) as connection:
            try:
                await connection.execute(statement)
            except asyncpg.IntegrityConstraintViolationError:
                return True
        return False

    async def tamper(self, statement: str) -> None:
        async with postgres.connected(self.url) as connection, connection.transaction():
            await connection.execute("ALTER TABLE journal DISABLE TRIGGER USER")
            assert await connection.execute(statement) in {"UPDATE 1", "DELETE 1"}

    async def stored(self) -> bytes:
        async with postgres.connected(self.url) as connection:
            rows = [row for table in _TABLES for row in await connection.fetch(f"SELECT t::text FROM {table} t")]
        return "\n".join(row[0] for row in rows).encode()


@pytest.fixture
async def database(postgres_server: postgres.Server) -> PostgresDatabase:
    return PostgresDatabase(await postgres_server.new_database())


class TestPostgres(LedgerSuite):
    @pytest.fixture
    async def database(self, postgres_server: postgres.Server) -> Database:
        return PostgresDatabase(await postgres_server.new_database())


def test_the_machine(postgres_server: postgres.Server) -> None:
    class Machine(LedgerMachine):
        def new_database(self, resources: contextlib.ExitStack) -> Database:
            return PostgresDatabase(self._runner.run(postgres_server.new_database()))

    run_state_machine_as_test(
        Machine,
        settings=settings(max_examples=25, stateful_step_count=40, deadline=None, derandomize=True, database=None),
    )


async def test_processes_share_a_budget_and_a_journal(database: PostgresDatabase) -> None:
    """Three stores as three processes have them: nothing in memory is shared."""
    async with contextlib.AsyncExitStack() as stack:
        stores = [await stack.enter_async_context(database.open()) for _ in range(3)]
        await prepare(stores[0], tenant=1000, project=730, of_key=5000)
        asked = [stores[number % 3].hold(f"op-{number}", PAYER, 10, 0, NOW + HOUR, HOLDER) for number in range(300)]
        outcomes = await asyncio.gather(*asked, return_exceptions=True)
        taken = [outcome for outcome in outcomes if not isinstance(outcome, BaseException)]
        assert len(taken) == 73
        assert all(isinstance(one, BudgetExhausted) for one in outcomes if isinstance(one, BaseException))
        # Each settled by all three at once, in another order each.
        settled = [settlement(f"{hold.operation_id}/1", amount=7, hold_id=hold.id) for hold in taken]
        batches = [random.Random(number).sample(settled, len(settled)) for number in range(3)]
        parts = [
            store.post(batch[start : start + 5])
            for store, batch in zip(stores, batches, strict=True)
            for start in range(0, len(batch), 5)
        ]
        states = [state for part in await asyncio.gather(*parts) for state in part]
        assert (states.count(PostState.POSTED), states.count(PostState.DUPLICATE)) == (73, 146)
        for store in stores:
            await assert_balances(store, spent=73 * 7, held=0)


async def test_an_operation_held_by_many_processes_at_once_is_held_once(database: PostgresDatabase) -> None:
    async with contextlib.AsyncExitStack() as stack:
        stores = [await stack.enter_async_context(database.open()) for _ in range(3)]
        await prepare(stores[0], tenant=1000)
        taken = await asyncio.gather(
            *(stores[number % 3].hold("op-1", PAYER, 10, 0, NOW + HOUR, HOLDER) for number in range(30))
        )
        assert len({hold.id for hold in taken}) == 1
        await assert_balances(stores[0], spent=0, held=10)


async def test_processes_that_start_at_once_make_the_tables_once(database: PostgresDatabase) -> None:
    async with contextlib.AsyncExitStack() as stack:
        stores = await asyncio.gather(*(stack.enter_async_context(database.open()) for _ in range(4)))
        await asyncio.gather(*(store.ping() for store in stores))


async def test_what_the_database_can_not_take_keeps_nobody_else_waiting(database: PostgresDatabase) -> None:
    async with database.open() as store:
        await prepare(store, tenant=1000)
        bad = [
            settlement("nul\0/1", amount=1),
            settlement("surrogate/1", amount=1, model="\ud800"),
            settlement("long/1", amount=1, start_micros=1 << 70),
            settlement("negative/1", amount=-1, debit="platform"),
        ]
        good = [settlement(f"good-{number}/1", amount=1) for number in range(8)]
        sent = [store.post([one]) for pair in zip(bad, good[:4], strict=True) for one in pair]
        outcomes = await asyncio.gather(*sent, *(store.post([one]) for one in good[4:]), return_exceptions=True)
        refused = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        assert len(refused) == len(bad)
        assert all(isinstance(one, StoreUnavailable) for one in refused)
        await assert_balances(store, spent=8, held=0)


async def test_a_process_that_stands_still_with_the_lock_is_thrown_out(database: PostgresDatabase) -> None:
    async with database.open() as store:
        await prepare(store)
        async with postgres.connected(database.url) as other:
            # As the store's own connections are set up.
            await other.execute("SET idle_in_transaction_session_timeout = 2000")
            transaction = other.transaction()
            await transaction.start()
            await other.execute("SELECT pg_advisory_xact_lock($1::bigint)", 0x534C5543)
            began = time.monotonic()
            await store.post([settlement("op-1/1", amount=1)])
            assert 1.0 < time.monotonic() - began < 8.0
            other.terminate()
        settings_ = await store._found(lambda c: c.exec_driver_sql("SHOW idle_in_transaction_session_timeout"))
        assert settings_.scalar() == "2s"


async def test_a_frozen_process_loses_its_turn_and_goes_on_afterwards(database: PostgresDatabase) -> None:
    async with database.open() as store:
        await prepare(store)
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.conformance.ledger.writer", "0", *database.writer,
            cwd=ROOT, env={"PYTHONPATH": f"{ROOT / 'gen'}:{ROOT}"}, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        assert child.stdout is not None
        try:
            for number in range(5):
                await child.stdout.readline()
                os.kill(child.pid, signal.SIGSTOP)
                # Wherever it stopped, others are served.
                async with asyncio.timeout(8.0):
                    await store.post([settlement(f"mine-{number}/1", amount=1)])
                os.kill(child.pid, signal.SIGCONT)
        finally:
            child.kill()
            await child.wait()
        assert (await store.verify()).problems == ()


async def test_a_server_that_is_away_is_told_at_once_and_used_again_when_it_is_back() -> None:
    with postgres.server() as started:
        url = await started.new_database()
        async with open_store(url_of(url)) as store:
            await prepare(store, tenant=1000)
            hold = await store.hold("op-1", PAYER, 10, 0, NOW + HOUR, HOLDER)
            started.stop()
            began = time.monotonic()
            for call in (
                store.ping(),
                store.post([settlement("op-1/1", amount=7, hold_id=hold.id)]),
                store.hold("op-2", PAYER, 10, 0, NOW + HOUR, HOLDER),
                store.chain_by_key("key-1"),
                store.verify(),
                store.usage(UsageFilter(), [], (), 1),
                store.create_tenant(Tenant("other", "", Limits(), NOW), ""),
            ):
                with pytest.raises(StoreUnavailable):
                    await call
            assert time.monotonic() - began < 3.0
            started.start()
            await store.post([settlement("op-1/1", amount=7, hold_id=hold.id)])
            await assert_balances(store, spent=7, held=0)


async def test_commits_are_durable_whatever_the_server_has_for_a_default() -> None:
    with postgres.server("synchronous_commit=off") as started:
        url = await started.new_database()
        async with open_store(url_of(url)) as store:
            found = await store._found(lambda c: c.exec_driver_sql("SHOW synchronous_commit"))
            assert found.scalar() == "on"


async def test_a_ledger_of_a_newer_version_is_not_touched(database: PostgresDatabase) -> None:
    async with database.open():
        pass
    async with postgres.connected(database.url) as connection:
        await connection.execute("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(RuntimeError, match="schema version 9999"):
        async with database.open():
            pass


async def test_the_tables_of_the_code_are_those_of_the_migrations(database: PostgresDatabase) -> None:
    async with database.open() as store, store._engine.connect() as connection:
        differences = await connection.run_sync(lambda c: compare_metadata(MigrationContext.configure(c), METADATA))
    assert differences == []


async def test_the_journal_can_not_be_emptied_either(database: PostgresDatabase) -> None:
    async with database.open() as store:
        await store.post([settlement("op-1/1", amount=1)])
        assert await database.refuses("TRUNCATE journal")
        assert (await store.head()).sequence == 1


async def test_requests_find_their_rows_by_an_index_in_tables_that_the_server_has_not_looked_at(
    database: PostgresDatabase,
) -> None:
    async with postgres.connected(database.url) as connection, database.open() as store:
        await prepare(store)
        for table in _TABLES:
            await connection.execute(f"ALTER TABLE {table} SET (autovacuum_enabled = off)")
        many = [settlement(f"op-{number}/1", amount=1) for number in range(5000)]
        for start in range(0, len(many), 500):
            await store.post(many[start : start + 500])
            for hold in await asyncio.gather(
                *(store.hold(f"h-{start}-{n}", PAYER, 1, 0, NOW + HOUR, HOLDER) for n in range(100))
            ):
                await store.void_hold(hold.id)
        assert await store.expire(NOW) == 0
        # The server sends its counts a moment after a transaction.
        await asyncio.sleep(1.5)
        read = await connection.fetch("SELECT relname, seq_tup_read FROM pg_stat_user_tables")
    for table in ("journal", "holds"):
        assert dict(read)[table] <= 5000, "read whole, again and again"


@pytest.mark.parametrize(
    ("text", "host", "query"),
    [
        ("postgresql://u:p@db:5433/ledger", "db", {}),
        ("postgres://u:p@db/ledger?sslmode=require", "db", {"ssl": "require"}),
    ],
)
def test_urls_are_those_that_everybody_writes(text: str, host: str, query: dict[str, str]) -> None:
    url = url_of(text)
    assert (url.drivername, url.host, url.database, dict(url.query)) == ("postgresql+asyncpg", host, "ledger", query)


@pytest.mark.parametrize("text", ["", "ledger.db", "mysql://u:hunter2@db/x", "postgresql://u:hunter2@db", "postgresql:///"])
def test_what_is_no_url_of_postgresql_is_refused_without_its_password(text: str) -> None:
    with pytest.raises(ValueError, match="must look like") as refused:
        url_of(text)
    assert "hunter2" not in str(refused.value)


async def test_a_caller_that_goes_away_does_not_undo_what_is_being_committed(database: PostgresDatabase) -> None:
    async with database.open() as store:
        await prepare(store, tenant=1000)
        calls = [asyncio.create_task(store.hold(f"op-{number}", PAYER, 1, 0, NOW + HOUR, HOLDER)) for number in range(50)]
        await asyncio.sleep(0)
        for call in calls[::2]:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        await store.ping()
        await store.hold("last", PAYER, 1, 0, NOW + HOUR, HOLDER)
        # Of each cancelled hold the operation id tells what became of it: it is there, and asked for again it is the same one.
        await asyncio.gather(*(store.hold(f"op-{number}", PAYER, 1, 0, NOW + HOUR, HOLDER) for number in range(50)))
        assert await balances(store) == (Balance(0, 51),) * 3


async def test_what_waits_at_the_end_is_committed(database: PostgresDatabase) -> None:
    async with database.open() as store:
        await prepare(store)
        waiting = [asyncio.create_task(store.post([settlement(f"op-{number}/1", amount=1)])) for number in range(100)]
        await asyncio.sleep(0)
    assert await asyncio.gather(*waiting) == [[PostState.POSTED]] * 100
    with pytest.raises(StoreUnavailable):
        await store.post([settlement("late/1", amount=1)])
    async with database.open() as store:
        assert (await store.head()).sequence == 100


async def test_payers_of_other_tenants_are_not_mixed_up_in_a_group(database: PostgresDatabase) -> None:
    async with database.open() as store:
        payers = [Payer(f"t{number}", "default", f"k{number}") for number in range(5)]
        for payer in payers:
            await store.create_tenant(Tenant(payer.tenant_id, "", Limits(budget_nano_usd=100), NOW), "")
            await store.create_key(key(payer.key_id, tenant_id=payer.tenant_id))
        calls = [store.hold(f"op-{n}", payers[n % 5], 10 + n % 5, 0, NOW + HOUR, HOLDER) for n in range(100)]
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        for number, payer in enumerate(payers):
            amount = 10 + number
            assert sum(not isinstance(one, BaseException) for one in outcomes[number::5]) == 100 // amount
            chain = await store.chain_by_key(payer.key_id)
            assert chain is not None
            assert chain.tenant.balance.held_nano_usd == 100 // amount * amount
