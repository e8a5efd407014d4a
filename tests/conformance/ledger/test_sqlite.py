from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import tempfile
import threading
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest
from hypothesis import settings

from services.metering.adapters.sqlite import open_store
from services.metering.errors import NotFound
from services.metering.ports import Store, UsageFilter
from tests.conformance.ledger.examples import PAYER, settlement
from tests.conformance.ledger.machine import LedgerMachine
from tests.conformance.ledger.suite import Database, LedgerSuite


class SqliteDatabase:
    """A directory with a ledger."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.writer: Sequence[str] = ("sqlite", str(directory))

    def open(self) -> AbstractAsyncContextManager[Store]:
        return open_store(self._directory)

    async def refuses(self, statement: str) -> bool:
        with contextlib.closing(sqlite3.connect(self._directory / "ledger.db")) as connection:
            try:
                connection.execute(statement)
            except sqlite3.IntegrityError:
                return True
            finally:
                connection.rollback()
        return False

    async def tamper(self, statement: str) -> None:
        with contextlib.closing(sqlite3.connect(self._directory / "ledger.db")) as connection:
            for name in ("update", "delete"):
                connection.execute(f"DROP TRIGGER journal_is_append_only_{name}")
            assert connection.execute(statement).rowcount == 1
            connection.commit()

    async def stored(self) -> bytes:
        return b"".join(path.read_bytes() for path in sorted(self._directory.iterdir()))


class TestSqlite(LedgerSuite):
    @pytest.fixture
    def database(self, tmp_path: Path) -> Database:
        return SqliteDatabase(tmp_path / "ledger")


class SqliteMachine(LedgerMachine):
    def new_database(self, resources: contextlib.ExitStack) -> Database:
        return SqliteDatabase(Path(resources.enter_context(tempfile.TemporaryDirectory())))


@pytest.mark.timeout(400)
class TestSqliteMachine(SqliteMachine.TestCase):  # type: ignore[valid-type,misc]  # made by hypothesis at run time
    # The same examples every time, so that a run of the suite says the same twice.
    settings = settings(max_examples=500, stateful_step_count=50, deadline=None, derandomize=True, database=None)


async def test_a_second_process_may_not_use_the_file(tmp_path: Path) -> None:
    async with open_store(tmp_path):
        with pytest.raises(RuntimeError, match="exactly one"):
            async with open_store(tmp_path):
                pass
    async with open_store(tmp_path) as again:
        await again.ping()


async def test_a_ledger_of_a_newer_version_is_not_touched(tmp_path: Path) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / "ledger.db")) as connection:
        connection.execute("PRAGMA user_version=1000")
    with pytest.raises(RuntimeError, match="schema version 1000"):
        async with open_store(tmp_path):
            pass


async def test_a_ledger_of_the_first_version_is_brought_up_and_keeps_what_it_has(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        await store.post([settlement("op-1/1", amount=7, observed=(None, None))])
    with contextlib.closing(sqlite3.connect(tmp_path / "ledger.db")) as connection:
        # What the first version had besides, and hadn't.
        connection.executescript(
            "DROP TABLE requests; CREATE INDEX journal_by_operation ON journal (operation_id); PRAGMA user_version=1;"
            "ALTER TABLE journal DROP COLUMN observed_input; ALTER TABLE journal DROP COLUMN observed_output;"
            "ALTER TABLE leases DROP COLUMN slot; ALTER TABLE leases DROP COLUMN incarnation;"
            "ALTER TABLE holds DROP COLUMN slot; ALTER TABLE holds DROP COLUMN incarnation;"
        )
        for table in ("tenants", "projects", "keys"):
            connection.execute(f"ALTER TABLE {table} DROP COLUMN model_limits")
    for _ in range(2):
        async with open_store(tmp_path) as store:
            assert [posted.entry.amount for posted in await store.entries("", "op-1", None, 10)] == [7]
            assert (await store.verify()).problems == ()
    with contextlib.closing(sqlite3.connect(tmp_path / "ledger.db")) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (6,)
        assert connection.execute("SELECT count(*) FROM requests").fetchone() == (0,)
        indices = {name for (name,) in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'index'")}
    assert "journal_by_tenant" in indices
    assert "journal_by_operation" not in indices


@pytest.mark.parametrize("tenant", ["", PAYER.tenant_id])
async def test_the_attempts_of_an_operation_are_found_by_an_index(tmp_path: Path, tenant: str) -> None:
    async with open_store(tmp_path) as store:
        await store.post([settlement(f"op-{number}/1", amount=1) for number in range(1000)])
        steps = 0

        def step() -> int:
            nonlocal steps
            steps += 1
            return 0

        store._report.set_progress_handler(step, 10)
        assert len(await store.entries(tenant, "op-500", None, 10)) == 1
    # A look at every entry takes thousands.
    assert steps < 50


async def test_requests_do_not_wait_behind_reports(tmp_path: Path) -> None:
    """A report takes time in proportion to the journal; a key must be found meanwhile."""
    async with open_store(tmp_path) as store:
        long_report = threading.Event()
        busy = store._reporters.submit(long_report.wait, 30)
        reports = [
            asyncio.create_task(report)
            for report in (store.verify(), store.usage(UsageFilter(), [], (), 1), store.entries("", "", None, 1))
        ]
        try:
            await store.ping()
            assert await store.chain_by_digest(bytes(32)) is None
            assert await store.chain_by_key("nobody") is None
            assert await store.expire(0.0) == 0
            with pytest.raises(NotFound):
                await store.void_hold("nobody")
            assert not any(report.done() for report in reports)
        finally:
            long_report.set()
        await asyncio.gather(*reports)
        assert busy.result()


async def test_commits_are_synced_to_the_disk(tmp_path: Path) -> None:
    """FULL in WAL mode syncs at every commit; a kill of the process can't show it, a power cut would."""
    async with open_store(tmp_path) as store:
        settings = [store._write.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous")]
    assert settings == ["wal", 2]
