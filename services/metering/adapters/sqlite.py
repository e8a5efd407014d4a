"""The ledger on SQLite: one file, one writer thread, group commit.

WAL with `synchronous=FULL`: what is committed survives a power cut. Everything that waits when the writer gets its turn goes into
one transaction, each operation in a savepoint of its own, and is confirmed after the commit; so the fsync is shared (reliability.md
M24: 37,000 reservations a second against 1,900). Exactly one process may use the file; a lock beside it sees to that.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import queue
import sqlite3
import threading
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, TypeVar

from services.metering.accounts import (
    Balance,
    Key,
    Level,
    Limits,
    Payer,
    Project,
    Tenant,
    key_account,
    models_from_json,
    models_to_json,
    project_account,
    tenant_account,
)
from services.metering.audit import MOST_PROBLEMS, Audit
from services.metering.errors import BudgetExhausted, Exists, MeteringError, NotFound, StoreUnavailable
from services.metering.ledger import (
    GENESIS,
    PLATFORM,
    REQUEST_SECONDS,
    SUCCEEDED,
    Entry,
    Head,
    Hold,
    HoldState,
    PostState,
    Replica,
    Settlement,
    Slice,
    Verdict,
    chained,
    charged_once,
    claims,
)
from services.metering.ports import Chain, Change, Posted, UsageFilter, UsageRow

SCHEMA_VERSION: Final = 6
FILE_NAME: Final = "ledger.db"
_MOST_PER_COMMIT: Final = 512
_VARIABLES: Final = 500
_MOST_EXPIRED: Final = 10_000
"""Request keys that one pass forgets, so that nobody waits long behind it."""
_LEVELS: Final = (Level.KEY.value, Level.PROJECT.value, Level.TENANT.value)
_ENTRY_COLUMNS: Final = ", ".join(Entry._fields)
_LEASE_COLUMNS: Final = "id, tenant_id, project_id, key_id, outstanding"
_LIMIT_FIELDS: Final = ("requests_per_minute", "tokens_per_minute", "concurrency")

_SCHEMA: Final = """
CREATE TABLE tenants (
  id TEXT PRIMARY KEY, display_name TEXT NOT NULL, requests_per_minute INTEGER, tokens_per_minute INTEGER, concurrency INTEGER,
  create_time REAL NOT NULL, request_id TEXT NOT NULL, model_limits TEXT NOT NULL DEFAULT '[]'
) STRICT;
CREATE TABLE projects (
  tenant_id TEXT NOT NULL REFERENCES tenants(id), id TEXT NOT NULL, display_name TEXT NOT NULL,
  requests_per_minute INTEGER, tokens_per_minute INTEGER, concurrency INTEGER, create_time REAL NOT NULL, request_id TEXT NOT NULL,
  model_limits TEXT NOT NULL DEFAULT '[]', PRIMARY KEY (tenant_id, id)
) STRICT;
CREATE TABLE keys (
  id TEXT PRIMARY KEY, sha256 BLOB NOT NULL UNIQUE, tenant_id TEXT NOT NULL, project_id TEXT NOT NULL, display_name TEXT NOT NULL,
  secret_hint TEXT NOT NULL, scopes TEXT NOT NULL, allowed_models TEXT NOT NULL,
  requests_per_minute INTEGER, tokens_per_minute INTEGER, concurrency INTEGER,
  create_time REAL NOT NULL, expire_time REAL, revoke_time REAL, cache_namespace TEXT NOT NULL,
  model_limits TEXT NOT NULL DEFAULT '[]', FOREIGN KEY (tenant_id, project_id) REFERENCES projects(tenant_id, id)
) STRICT;
CREATE INDEX keys_by_tenant ON keys (tenant_id, id);
-- One account per key, project and tenant. What may still be held is budget - spent - held.
CREATE TABLE accounts (
  name TEXT PRIMARY KEY, budget INTEGER, spent INTEGER NOT NULL DEFAULT 0, held INTEGER NOT NULL DEFAULT 0
) STRICT, WITHOUT ROWID;
CREATE TABLE holds (
  id TEXT PRIMARY KEY, operation_id TEXT NOT NULL UNIQUE, tenant_id TEXT NOT NULL, project_id TEXT NOT NULL, key_id TEXT NOT NULL,
  amount INTEGER NOT NULL, state TEXT NOT NULL, expire_time REAL NOT NULL, budget_before INTEGER, budget_level TEXT NOT NULL,
  slot TEXT NOT NULL DEFAULT '', incarnation TEXT NOT NULL DEFAULT ''
) STRICT;
CREATE INDEX open_holds ON holds (expire_time) WHERE state = 'open';
CREATE TABLE leases (
  id TEXT PRIMARY KEY, tenant_id TEXT NOT NULL, project_id TEXT NOT NULL, key_id TEXT NOT NULL,
  outstanding INTEGER NOT NULL, expire_time REAL NOT NULL, posted INTEGER NOT NULL DEFAULT 0,
  slot TEXT NOT NULL DEFAULT '', incarnation TEXT NOT NULL DEFAULT ''
) STRICT;
CREATE INDEX leases_by_expiry ON leases (expire_time);
"""

_REQUESTS: Final = """
-- The operation that was charged for a request. Not part of the chain: what it decides is, as the journal's entries.
CREATE TABLE requests (key BLOB PRIMARY KEY, operation_id TEXT NOT NULL, expire_time REAL NOT NULL) STRICT, WITHOUT ROWID;
CREATE INDEX requests_by_expiry ON requests (expire_time);
"""

_JOURNAL: Final = """
CREATE TABLE journal (
  sequence INTEGER PRIMARY KEY, attempt_id TEXT NOT NULL UNIQUE, operation_id TEXT NOT NULL, debit TEXT NOT NULL, credit TEXT NOT NULL,
  amount INTEGER NOT NULL CHECK (amount >= 0), tenant_id TEXT NOT NULL, project_id TEXT NOT NULL, key_id TEXT NOT NULL,
  model TEXT NOT NULL, provider TEXT NOT NULL, input_tokens INTEGER NOT NULL, cached_tokens INTEGER NOT NULL,
  cache_write_tokens INTEGER NOT NULL, output_tokens INTEGER NOT NULL, reasoning_tokens INTEGER NOT NULL, images INTEGER NOT NULL,
  usage_source INTEGER NOT NULL, price_version TEXT NOT NULL, start_micros INTEGER NOT NULL, duration_micros INTEGER NOT NULL,
  outcome INTEGER NOT NULL, error_reason INTEGER NOT NULL, task_type INTEGER NOT NULL, saved INTEGER NOT NULL,
  cache_status INTEGER NOT NULL, attempt_number INTEGER NOT NULL, flags TEXT NOT NULL, post_micros INTEGER NOT NULL,
  observed_input INTEGER, observed_output INTEGER, hash BLOB NOT NULL
) STRICT;
CREATE INDEX journal_by_tenant ON journal (tenant_id, start_micros);
CREATE TRIGGER journal_is_append_only_update BEFORE UPDATE ON journal BEGIN SELECT RAISE(ABORT, 'the journal is append-only'); END;
CREATE TRIGGER journal_is_append_only_delete BEFORE DELETE ON journal BEGIN SELECT RAISE(ABORT, 'the journal is append-only'); END;
"""

_MIGRATIONS: Final = {
    # Attempts are found by their ids, which begin with the operation's: an index less to write for every attempt.
    1: "DROP INDEX journal_by_operation;",
    2: _REQUESTS,
    3: "ALTER TABLE journal ADD COLUMN observed_input INTEGER; ALTER TABLE journal ADD COLUMN observed_output INTEGER;",
    4: "".join(
        f"ALTER TABLE {table} ADD COLUMN slot TEXT NOT NULL DEFAULT ''; "
        f"ALTER TABLE {table} ADD COLUMN incarnation TEXT NOT NULL DEFAULT '';"
        for table in ("holds", "leases")
    ),
    5: "".join(
        f"ALTER TABLE {table} ADD COLUMN model_limits TEXT NOT NULL DEFAULT '[]';" for table in ("tenants", "projects", "keys")
    ),
}
"""What brings each older version to the next one."""

_WIDTH: Final = len(Entry._fields) + 1
"""Values of a row of the journal: an entry and its hash."""
_ROWS_PER_INSERT: Final = (64, 16, 4, 1)
"""Rows that one INSERT takes, largest first. Each execution of a statement gives up the interpreter and has to win it back from the
event loop, so rows by the dozen cost the loop a fraction of what they cost one by one; few sizes, so that the statements stay prepared."""
_INSERT_ENTRIES: Final = {
    count: f"INSERT INTO journal ({_ENTRY_COLUMNS}, hash) VALUES " + ", ".join([f"({', '.join('?' * _WIDTH)})"] * count)
    for count in _ROWS_PER_INSERT
}
_HOLD_ALL: Final = """
UPDATE accounts SET held = held + ?1 WHERE name IN (?2, ?3, ?4) AND (budget IS NULL OR budget - spent - held >= ?5)
"""
"""The one statement that decides: its row count is 3 or the reservation is rolled back."""

_GROUPS: Final = {
    "tenant": "tenant_id",
    "project": "project_id",
    "key": "key_id",
    "model": "model",
    "provider": "provider",
    "task_type": "CAST(task_type AS TEXT)",
    "hour": "strftime('%Y-%m-%dT%H:00:00Z', start_micros / 1000000, 'unixepoch')",
    "day": "strftime('%Y-%m-%d', start_micros / 1000000, 'unixepoch')",
}

_ANSWERED: Final = f"outcome = {SUCCEEDED} AND debit <> '{PLATFORM}'"
_SOURCE: Final = "CASE WHEN input_tokens + output_tokens > 0 THEN usage_source END"

T = TypeVar("T")
_Operation = Callable[[sqlite3.Connection], Any]


class _Job:
    __slots__ = ("error", "future", "loop", "operation", "result")

    def __init__(self, operation: _Operation, loop: asyncio.AbstractEventLoop) -> None:
        self.operation = operation
        self.loop = loop
        self.future: asyncio.Future[Any] = loop.create_future()
        self.result: Any = None
        self.error: BaseException | None = None

    def resolve(self) -> None:
        if self.future.done():
            return
        if self.error is not None:
            self.future.set_exception(self.error)
        else:
            self.future.set_result(self.result)


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=5.0)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("PRAGMA foreign_keys=ON")
    connection.execute("PRAGMA wal_autocheckpoint=4000")
    return connection


class SqliteStore:
    """Store on one SQLite file. Use `open_store`."""

    def __init__(self, path: Path) -> None:
        self._write = _connect(path)
        self._read = _connect(path)
        self._report = _connect(path)
        self._migrate()
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._head = self._last_hash()
        self._thread = threading.Thread(target=self._run, name="ledger", daemon=True)
        self._readers = ThreadPoolExecutor(1, thread_name_prefix="ledger-read")
        # What takes time in proportion to the journal has a thread of its own: no request waits behind it.
        self._reporters = ThreadPoolExecutor(1, thread_name_prefix="ledger-report")
        self._thread.start()

    def close(self) -> None:
        """Ends the writer after what waits is committed."""
        self._jobs.put(None)
        self._thread.join()
        self._readers.shutdown()
        self._reporters.shutdown()
        self._write.close()
        self._read.close()
        self._report.close()

    def _migrate(self) -> None:
        version = self._write.execute("PRAGMA user_version").fetchone()[0]
        if version > SCHEMA_VERSION:
            raise RuntimeError(
                f"the ledger has schema version {version} and this Sluice knows {SCHEMA_VERSION}; use a newer one"
            )
        if version == 0:
            self._write.executescript(f"BEGIN; {_SCHEMA} {_REQUESTS} {_JOURNAL} PRAGMA user_version={SCHEMA_VERSION}; COMMIT;")
            return
        for old in range(version, SCHEMA_VERSION):
            self._write.executescript(f"BEGIN; {_MIGRATIONS[old]} PRAGMA user_version={old + 1}; COMMIT;")

    def _last_hash(self) -> bytes:
        return _head(self._write).hash

    # The writer thread.

    def _run(self) -> None:
        while True:
            job = self._jobs.get()
            jobs: list[_Job] = []
            last = job is None
            while job is not None:
                jobs.append(job)
                if len(jobs) >= _MOST_PER_COMMIT:
                    break
                try:
                    job = self._jobs.get_nowait()
                except queue.Empty:
                    break
                last = job is None
            if jobs:
                self._commit(jobs)
            if last:
                return

    def _commit(self, jobs: list[_Job]) -> None:
        head = self._head
        connection = self._write
        try:
            connection.execute("BEGIN IMMEDIATE")
            for job in jobs:
                self._one(connection, job)
            connection.execute("COMMIT")
        except sqlite3.Error:
            self._head = head
            with contextlib.suppress(sqlite3.Error):
                connection.execute("ROLLBACK")
            for job in jobs:
                job.error = StoreUnavailable()
        by_loop: dict[asyncio.AbstractEventLoop, list[_Job]] = defaultdict(list)
        for job in jobs:
            by_loop[job.loop].append(job)
        for loop, done in by_loop.items():
            with contextlib.suppress(RuntimeError):
                # The loop may be closed when the process ends while we commit.
                loop.call_soon_threadsafe(_resolve, done)

    def _one(self, connection: sqlite3.Connection, job: _Job) -> None:
        """One operation in a savepoint: its refusal undoes it alone. An error of the store undoes the whole commit.

        Values that the store can't take are the operation's own fault, too: were they the commit's, one settlement that can never
        be written would keep all others out for ever.
        """
        head = self._head
        connection.execute("SAVEPOINT one")
        try:
            job.result = job.operation(connection)
        except MeteringError as error:
            self._head = head
            connection.execute("ROLLBACK TO one")
            job.error = error
        except sqlite3.IntegrityError:
            self._head = head
            connection.execute("ROLLBACK TO one")
            job.error = StoreUnavailable()
        except sqlite3.Error:
            raise
        except Exception as error:  # noqa: BLE001 - the writer serves everybody and outlives a fault of one operation
            self._head = head
            connection.execute("ROLLBACK TO one")
            job.error = error
        connection.execute("RELEASE one")

    async def _written(self, operation: Callable[[sqlite3.Connection], T]) -> T:
        job = _Job(operation, asyncio.get_running_loop())
        self._jobs.put(job)
        # A caller that goes away doesn't undo what is being committed.
        result: T = await asyncio.shield(job.future)
        return result

    async def _found(self, operation: Callable[[sqlite3.Connection], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._readers, _guarded, operation, self._read)

    async def _reported(self, operation: Callable[[sqlite3.Connection], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._reporters, _guarded, operation, self._report)

    # Store.

    async def ping(self) -> None:
        """See Store."""
        await self._found(lambda c: c.execute("SELECT 1").fetchone())

    async def chain_by_digest(self, sha256: bytes) -> Chain | None:
        """See Store."""
        return await self._found(lambda c: _chain(c, "k.sha256 = ?", sha256))

    async def chain_by_key(self, key_id: str) -> Chain | None:
        """See Store."""
        return await self._found(lambda c: _chain(c, "k.id = ?", key_id))

    async def create_tenant(self, tenant: Tenant, request_id: str) -> Tenant:
        """See Store."""

        def operation(c: sqlite3.Connection) -> Tenant:
            row = c.execute("SELECT request_id FROM tenants WHERE id = ?", (tenant.id,)).fetchone()
            if row is not None:
                if not request_id or row[0] != request_id:
                    raise Exists(f"tenants/{tenant.id}")
            else:
                values = (
                    tenant.id,
                    tenant.display_name,
                    *_rates(tenant.limits),
                    tenant.create_time,
                    request_id,
                    _models(tenant.limits),
                )
                c.execute("INSERT INTO tenants VALUES (?, ?, ?, ?, ?, ?, ?, ?)", values)
                _open_account(c, tenant_account(tenant.id), tenant.limits)
                default = (tenant.id, "default", "", None, None, None, tenant.create_time, request_id, "[]")
                c.execute("INSERT INTO projects VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", default)
                _open_account(c, project_account(tenant.id, "default"), Limits())
            return _one_tenant(c, tenant.id)

        return await self._written(operation)

    async def tenant(self, tenant_id: str) -> Tenant | None:
        """See Store."""

        def operation(c: sqlite3.Connection) -> Tenant | None:
            found = _tenants(c, "t.id = ?", (tenant_id,), 1)
            return found[0] if found else None

        return await self._found(operation)

    async def tenants(self, after: str, limit: int) -> list[Tenant]:
        """See Store."""
        return await self._found(lambda c: _tenants(c, "t.id > ?", (after,), limit))

    async def update_tenant(self, tenant_id: str, display_name: str | None, change: Change) -> Tenant:
        """See Store."""

        def operation(c: sqlite3.Connection) -> Tenant:
            found = _tenants(c, "t.id = ?", (tenant_id,), 1)
            if not found:
                raise NotFound(f"tenants/{tenant_id}")
            limits = change(found[0].limits)
            c.execute(
                "UPDATE tenants SET display_name = COALESCE(?, display_name), requests_per_minute = ?, tokens_per_minute = ?, "
                "concurrency = ?, model_limits = ? WHERE id = ?",
                (display_name, *_rates(limits), _models(limits), tenant_id),
            )
            c.execute("UPDATE accounts SET budget = ? WHERE name = ?", (limits.budget_nano_usd, tenant_account(tenant_id)))
            return _one_tenant(c, tenant_id)

        return await self._written(operation)

    async def create_project(self, project: Project, request_id: str) -> Project:
        """See Store."""

        def operation(c: sqlite3.Connection) -> Project:
            if c.execute("SELECT 1 FROM tenants WHERE id = ?", (project.tenant_id,)).fetchone() is None:
                raise NotFound(f"tenants/{project.tenant_id}")
            row = c.execute(
                "SELECT request_id FROM projects WHERE tenant_id = ? AND id = ?", (project.tenant_id, project.id)
            ).fetchone()
            if row is not None:
                if not request_id or row[0] != request_id:
                    raise Exists(f"tenants/{project.tenant_id}/projects/{project.id}")
            else:
                values = (
                    project.tenant_id,
                    project.id,
                    project.display_name,
                    *_rates(project.limits),
                    project.create_time,
                    request_id,
                    _models(project.limits),
                )
                c.execute("INSERT INTO projects VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", values)
                _open_account(c, project_account(project.tenant_id, project.id), project.limits)
            return _projects(c, "p.tenant_id = ? AND p.id = ?", (project.tenant_id, project.id), 1)[0]

        return await self._written(operation)

    async def project(self, tenant_id: str, project_id: str) -> Project | None:
        """See Store."""

        def operation(c: sqlite3.Connection) -> Project | None:
            found = _projects(c, "p.tenant_id = ? AND p.id = ?", (tenant_id, project_id), 1)
            return found[0] if found else None

        return await self._found(operation)

    async def projects(self, tenant_id: str, after: str, limit: int) -> list[Project]:
        """See Store."""
        return await self._found(lambda c: _projects(c, "p.tenant_id = ? AND p.id > ?", (tenant_id, after), limit))

    async def update_project(self, tenant_id: str, project_id: str, display_name: str | None, change: Change) -> Project:
        """See Store."""

        def operation(c: sqlite3.Connection) -> Project:
            found = _projects(c, "p.tenant_id = ? AND p.id = ?", (tenant_id, project_id), 1)
            if not found:
                raise NotFound(f"tenants/{tenant_id}/projects/{project_id}")
            limits = change(found[0].limits)
            c.execute(
                "UPDATE projects SET display_name = COALESCE(?, display_name), requests_per_minute = ?, tokens_per_minute = ?, "
                "concurrency = ?, model_limits = ? WHERE tenant_id = ? AND id = ?",
                (display_name, *_rates(limits), _models(limits), tenant_id, project_id),
            )
            account = project_account(tenant_id, project_id)
            c.execute("UPDATE accounts SET budget = ? WHERE name = ?", (limits.budget_nano_usd, account))
            return _projects(c, "p.tenant_id = ? AND p.id = ?", (tenant_id, project_id), 1)[0]

        return await self._written(operation)

    async def create_key(self, key: Key) -> Key:
        """See Store."""

        def operation(c: sqlite3.Connection) -> Key:
            owner = (key.tenant_id, key.project_id)
            if c.execute("SELECT 1 FROM projects WHERE tenant_id = ? AND id = ?", owner).fetchone() is None:
                raise NotFound(f"tenants/{key.tenant_id}/projects/{key.project_id}")
            if c.execute("SELECT 1 FROM keys WHERE id = ? OR sha256 = ?", (key.id, key.sha256)).fetchone() is not None:
                raise Exists(f"keys/{key.id}")
            values = (
                key.id, key.sha256, key.tenant_id, key.project_id, key.display_name, key.secret_hint, json.dumps(key.scopes),
                json.dumps(key.allowed_models), *_rates(key.limits), key.create_time, key.expire_time, key.revoke_time,
                key.cache_namespace, _models(key.limits),
            )  # fmt: skip
            c.execute(f"INSERT INTO keys VALUES ({', '.join('?' * len(values))})", values)
            _open_account(c, key_account(key.id), key.limits)
            return _keys(c, "k.id = ?", (key.id,), 1)[0]

        return await self._written(operation)

    async def keys(self, tenant_id: str, project_id: str, after: str, limit: int) -> list[Key]:
        """See Store."""
        where, values = "k.tenant_id = ? AND k.id > ?", [tenant_id, after]
        if project_id:
            where, values = where + " AND k.project_id = ?", [*values, project_id]
        return await self._found(lambda c: _keys(c, where, tuple(values), limit))

    async def revoke_key(self, key_id: str, now: float) -> Key:
        """See Store."""

        def operation(c: sqlite3.Connection) -> Key:
            c.execute("UPDATE keys SET revoke_time = ? WHERE id = ? AND revoke_time IS NULL", (now, key_id))
            found = _keys(c, "k.id = ?", (key_id,), 1)
            if not found:
                raise NotFound(f"keys/{key_id}")
            return found[0]

        return await self._written(operation)

    async def hold(self, operation_id: str, payer: Payer, amount: int, least: int, expire_time: float, holder: Replica) -> Hold:
        """See Store."""

        def operation(c: sqlite3.Connection) -> Hold:
            known = c.execute("SELECT * FROM holds WHERE operation_id = ?", (operation_id,)).fetchone()
            if known is not None:
                hold = _hold_of(known)
                if hold.payer != payer:
                    raise Exists(f"holds/{hold.id}")
                return hold
            left, level = _tightest(c, payer)
            taken = amount
            if not _reserve(c, payer, taken):
                if left is None or least <= 0 or left < least:
                    raise BudgetExhausted(level, amount, left or 0)
                taken = left
                if not _reserve(c, payer, taken):
                    raise BudgetExhausted(level, amount, left)
            hold = Hold(f"hold-{operation_id}", operation_id, payer, taken, HoldState.OPEN, expire_time, left, level, holder)
            c.execute(
                "INSERT INTO holds VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    hold.id,
                    operation_id,
                    payer.tenant_id,
                    payer.project_id,
                    payer.key_id,
                    taken,
                    hold.state.value,
                    expire_time,
                    left,
                    level,
                    holder.slot,
                    holder.incarnation,
                ),
            )
            return hold

        return await self._written(operation)

    async def void_hold(self, hold_id: str, expire_time: float | None = None) -> HoldState:
        """See Store."""

        def operation(c: sqlite3.Connection) -> HoldState:
            row = c.execute("SELECT * FROM holds WHERE id = ?", (hold_id,)).fetchone()
            if row is None:
                raise NotFound(f"holds/{hold_id}")
            hold = _hold_of(row)
            if hold.state is not HoldState.OPEN:
                return hold.state
            if expire_time is not None:
                c.execute("UPDATE holds SET expire_time = min(expire_time, ?) WHERE id = ?", (expire_time, hold_id))
                return HoldState.OPEN
            _end_hold(c, hold, HoldState.VOIDED)
            return HoldState.VOIDED

        return await self._written(operation)

    async def grant_slice(
        self, lease_id: str, payer: Payer, wanted: int, reserve: int, expire_time: float, holder: Replica
    ) -> Slice:
        """See Store."""

        def operation(c: sqlite3.Connection) -> Slice:
            owner = c.execute("SELECT tenant_id, project_id, key_id FROM leases WHERE id = ?", (lease_id,)).fetchone()
            if owner is not None and Payer(*owner) != payer:
                raise NotFound(f"leases/{lease_id}")
            left, level = _tightest(c, payer)
            granted = 0
            if left is None:
                granted = -1
            elif wanted > 0 and left - wanted >= reserve and _reserve(c, payer, wanted):
                granted = wanted
            c.execute(
                "INSERT INTO leases VALUES (?1, ?2, ?3, ?4, ?5, ?6, 0, ?7, ?8) ON CONFLICT (id) DO UPDATE SET "
                "outstanding = outstanding + ?5, expire_time = ?6",
                (
                    *(lease_id, payer.tenant_id, payer.project_id, payer.key_id, max(0, granted), expire_time),
                    *(holder.slot, holder.incarnation),
                ),
            )
            if left is None:
                return Slice(-1, None, None, "")
            budget = c.execute(
                "SELECT budget FROM accounts WHERE name = ?", (payer.accounts[_LEVELS.index(level)],)
            ).fetchone()[0]
            return Slice(granted, budget, left - granted, level)

        return await self._written(operation)

    async def return_lease(self, lease_id: str, owed: int, expire_time: float) -> None:
        """See Store."""

        def operation(c: sqlite3.Connection) -> None:
            row = c.execute(f"SELECT {_LEASE_COLUMNS}, posted FROM leases WHERE id = ?", (lease_id,)).fetchone()
            if row is None:
                return
            _, tenant_id, project_id, key_id, outstanding, posted = row
            # Costs that the replica knows of and whose settlements are still on their way must not be spent a second time.
            kept = min(max(0, owed - posted), outstanding)
            _free(c, Payer(tenant_id, project_id, key_id), outstanding - kept)
            if kept:
                c.execute("UPDATE leases SET outstanding = ?, expire_time = ? WHERE id = ?", (kept, expire_time, lease_id))
            else:
                c.execute("DELETE FROM leases WHERE id = ?", (lease_id,))

        await self._written(operation)

    async def end_reservations(self, survivor: Replica, expire_time: float) -> int:
        """See Store."""
        if not survivor.slot:
            return 0
        others = (survivor.slot, survivor.incarnation)

        def operation(c: sqlite3.Connection) -> int:
            leases = c.execute(
                "UPDATE leases SET expire_time = min(expire_time, ?) WHERE slot = ? AND incarnation <> ?",
                (expire_time, *others),
            )
            holds = c.execute(
                "UPDATE holds SET expire_time = min(expire_time, ?) WHERE state = 'open' AND slot = ? AND incarnation <> ?",
                (expire_time, *others),
            )
            return leases.rowcount + holds.rowcount

        return await self._written(operation)

    async def post(self, settlements: Sequence[Settlement]) -> list[PostState]:
        """See Store."""
        return await self._written(lambda c: self._post(c, settlements))

    def _post(self, c: sqlite3.Connection, settlements: Sequence[Settlement]) -> list[PostState]:
        try:
            return self._append(c, settlements, set())
        except sqlite3.IntegrityError:
            # Some are posted already, which is rare: it is looked for when the journal has refused one.
            c.execute("ROLLBACK TO one")
            return self._append(c, settlements, _posted(c, [settlement.entry.attempt_id for settlement in settlements]))

    def _append(self, c: sqlite3.Connection, settlements: Sequence[Settlement], known: set[str]) -> list[PostState]:
        """Posts those that aren't `known`. sqlite3.IntegrityError when the journal has one all the same; what was written is to be undone."""
        states: list[PostState] = []
        values: list[Any] = []
        spent: dict[tuple[str, str, str], int] = defaultdict(int)
        leased: dict[str, int] = defaultdict(int)
        ended: list[str] = []
        head = self._head
        owners = _owners(c, [settlement.request_key for settlement in settlements if settlement.request_key])
        claimed: list[tuple[bytes, str, float]] = []
        for settlement in settlements:
            entry, lease_id, hold_id, is_final, request_key = settlement
            attempt_id = entry.attempt_id
            if attempt_id in known:
                states.append(PostState.DUPLICATE)
                continue
            known.add(attempt_id)
            states.append(PostState.POSTED)
            if request_key:
                entry = charged_once(settlement, owners.get(request_key))
                if request_key not in owners and claims(settlement):
                    owners[request_key] = entry.operation_id
                    claimed.append((request_key, entry.operation_id, entry.post_micros / 1e6 + REQUEST_SECONDS))
            head = chained(head, entry)
            values.extend(entry)
            values.append(head)
            amount = entry.amount
            if amount and entry.debit != PLATFORM:
                spent[entry.tenant_id, entry.project_id, entry.key_id] += amount
                if lease_id:
                    leased[lease_id] += amount
            if hold_id and is_final:
                ended.append(hold_id)
        _insert(c, values)
        if claimed:
            c.executemany("INSERT INTO requests VALUES (?, ?, ?)", claimed)
        for ids, amount in spent.items():
            first, second, third = Payer(*ids).accounts
            c.execute(
                "INSERT INTO accounts (name, spent) VALUES (?1, ?4), (?2, ?4), (?3, ?4) "
                "ON CONFLICT (name) DO UPDATE SET spent = spent + ?4",
                (first, second, third, amount),
            )
        for lease_id, amount in leased.items():
            row = c.execute(f"SELECT {_LEASE_COLUMNS} FROM leases WHERE id = ?", (lease_id,)).fetchone()
            if row is None:
                # It expired: its money went back, and the late settlement is posted all the same.
                continue
            _, tenant_id, project_id, key_id, outstanding = row
            used = min(amount, outstanding)
            c.execute(
                "UPDATE leases SET outstanding = outstanding - ?1, posted = posted + ?2 WHERE id = ?3", (used, amount, lease_id)
            )
            _free(c, Payer(tenant_id, project_id, key_id), used)
        for hold_id in ended:
            row = c.execute("SELECT * FROM holds WHERE id = ?", (hold_id,)).fetchone()
            if row is not None and (hold := _hold_of(row)).state is HoldState.OPEN:
                _end_hold(c, hold, HoldState.POSTED)
        self._head = head
        return states

    async def expire(self, now: float) -> int:
        """See Store."""

        def due(c: sqlite3.Connection) -> bool:
            row = c.execute(
                "SELECT EXISTS (SELECT 1 FROM holds WHERE state = 'open' AND expire_time <= ?1) "
                "OR EXISTS (SELECT 1 FROM leases WHERE expire_time <= ?1) OR EXISTS (SELECT 1 FROM requests WHERE expire_time <= ?1)",
                (now,),
            ).fetchone()
            return bool(row[0])

        def operation(c: sqlite3.Connection) -> int:
            holds = c.execute("SELECT * FROM holds WHERE state = 'open' AND expire_time <= ? LIMIT 1000", (now,)).fetchall()
            for row in holds:
                _end_hold(c, _hold_of(row), HoldState.EXPIRED)
            over = f"SELECT {_LEASE_COLUMNS} FROM leases WHERE expire_time <= ? LIMIT 1000"
            leases = c.execute(over, (now,)).fetchall()
            for lease_id, tenant_id, project_id, key_id, outstanding in leases:
                _free(c, Payer(tenant_id, project_id, key_id), outstanding)
                c.execute("DELETE FROM leases WHERE id = ?", (lease_id,))
            c.execute(
                "DELETE FROM requests WHERE key IN (SELECT key FROM requests WHERE expire_time <= ? LIMIT ?)",
                (now, _MOST_EXPIRED),
            )
            return len(holds) + len(leases)

        if not await self._found(due):
            return 0
        return await self._written(operation)

    async def usage(self, wanted: UsageFilter, group_by: Sequence[str], after: Sequence[str], limit: int) -> list[UsageRow]:
        """See Store."""
        groups = [_GROUPS[name] for name in group_by]
        where, values = _usage_where(wanted, groups, after)
        columns = ", ".join([*groups, ""]) if groups else ""
        grouping = f"GROUP BY {', '.join(groups)} ORDER BY {', '.join(groups)}" if groups else ""
        # A request is counted at its first attempt or its cache hit; hits are those with a status of their own.
        statement = f"""
            SELECT {columns} COUNT(DISTINCT operation_id), COUNT(DISTINCT CASE WHEN {_ANSWERED} THEN operation_id END),
              SUM(cache_status > 0), SUM(cache_status = 0),
              SUM(cache_status = 0 AND attempt_number > 1), SUM(input_tokens), SUM(cached_tokens), SUM(cache_write_tokens),
              SUM(output_tokens), SUM(reasoning_tokens), SUM(images), SUM(CASE WHEN debit = '{PLATFORM}' THEN 0 ELSE amount END),
              SUM(saved), CASE WHEN MIN({_SOURCE}) > 0 THEN MAX({_SOURCE}) ELSE 0 END
            FROM journal {where} {grouping} LIMIT ?
        """

        def operation(c: sqlite3.Connection) -> list[UsageRow]:
            rows = c.execute(statement, (*values, limit)).fetchall()
            count = len(groups)
            return [
                UsageRow(tuple(map(str, row[:count])), *(int(value or 0) for value in row[count:]))
                for row in rows
                if row[count]
            ]

        return await self._reported(operation)

    async def entries(self, tenant_id: str, operation_id: str, before: int | None, limit: int) -> list[Posted]:
        """See Store."""
        where: list[str] = []
        values: list[str | int] = []
        if before is not None:
            where.append("sequence < ?")
            values.append(before)
        if tenant_id:
            # The plus keeps the index by tenant out of it, which would be preferred to the few attempts of one operation.
            where.append("+tenant_id = ?" if operation_id else "tenant_id = ?")
            values.append(tenant_id)
        if operation_id:
            # Every id of an attempt is `<operation>/...`, and "0" comes after "/".
            where.append("attempt_id > ? AND attempt_id < ? AND operation_id = ?")
            values += [f"{operation_id}/", f"{operation_id}0", operation_id]
        wanted = f"WHERE {' AND '.join(where)}" if where else ""
        statement = f"SELECT sequence, {_ENTRY_COLUMNS} FROM journal {wanted} ORDER BY sequence DESC LIMIT ?"
        return await self._reported(
            lambda c: [Posted(row[0], Entry(*row[1:])) for row in c.execute(statement, (*values, limit))]
        )

    async def journal(self, wanted: UsageFilter, after: int, limit: int) -> list[Posted]:
        """See Store."""
        where, values = _usage_where(wanted, [], ())
        place = f"{where} AND sequence > ?" if where else "WHERE sequence > ?"
        # By the rows' own order: an index would sort all that a tenant has, for every page of it.
        statement = f"SELECT sequence, {_ENTRY_COLUMNS} FROM journal NOT INDEXED {place} ORDER BY sequence LIMIT ?"
        return await self._reported(
            lambda c: [Posted(row[0], Entry(*row[1:])) for row in c.execute(statement, (*values, after, limit))]
        )

    async def head(self) -> Head:
        """See Store."""
        return await self._found(_head)

    async def verify(self, expected: Head | None = None) -> Verdict:
        """See Store."""
        return await self._reported(lambda c: verify_connection(c, expected))


def _insert(c: sqlite3.Connection, values: Sequence[Any]) -> None:
    """Appends rows of the journal, of which `values` holds `_WIDTH` for each."""
    at, left = 0, len(values) // _WIDTH
    for size in _ROWS_PER_INSERT:
        while left >= size:
            c.execute(_INSERT_ENTRIES[size], values[at : at + size * _WIDTH])
            at += size * _WIDTH
            left -= size


def _posted(c: sqlite3.Connection, attempt_ids: Sequence[str]) -> set[str]:
    """Those that are in the journal."""
    known: set[str] = set()
    for start in range(0, len(attempt_ids), _VARIABLES):
        part = attempt_ids[start : start + _VARIABLES]
        marks = ", ".join("?" * len(part))
        known.update(row[0] for row in c.execute(f"SELECT attempt_id FROM journal WHERE attempt_id IN ({marks})", part))
    return known


def _owners(c: sqlite3.Connection, keys: Sequence[bytes]) -> dict[bytes, str]:
    """The operations that were charged for requests, by the requests' keys."""
    owners: dict[bytes, str] = {}
    for start in range(0, len(keys), _VARIABLES):
        part = keys[start : start + _VARIABLES]
        marks = ", ".join("?" * len(part))
        owners.update(c.execute(f"SELECT key, operation_id FROM requests WHERE key IN ({marks})", part))
    return owners


def _guarded(operation: Callable[[sqlite3.Connection], T], connection: sqlite3.Connection) -> T:
    try:
        return operation(connection)
    except sqlite3.Error as error:
        raise StoreUnavailable from error


def _resolve(jobs: list[_Job]) -> None:
    for job in jobs:
        job.resolve()


def _rates(limits: Limits) -> tuple[int | None, ...]:
    return tuple(getattr(limits, name) for name in _LIMIT_FIELDS)


def _models(limits: Limits) -> str:
    return models_to_json(limits.models)


def _open_account(c: sqlite3.Connection, name: str, limits: Limits) -> None:
    c.execute(
        "INSERT INTO accounts (name, budget) VALUES (?1, ?2) ON CONFLICT (name) DO UPDATE SET budget = ?2",
        (name, limits.budget_nano_usd),
    )


def _reserve(c: sqlite3.Connection, payer: Payer, amount: int) -> bool:
    """Holds `amount` at all three accounts, or at none and False."""
    c.execute("SAVEPOINT reserve")
    done = c.execute(_HOLD_ALL, (amount, *payer.accounts, amount)).rowcount == 3
    if not done:
        c.execute("ROLLBACK TO reserve")
    c.execute("RELEASE reserve")
    return done


def _free(c: sqlite3.Connection, payer: Payer, amount: int) -> None:
    if amount:
        c.execute("UPDATE accounts SET held = held - ? WHERE name IN (?, ?, ?)", (amount, *payer.accounts))


def _end_hold(c: sqlite3.Connection, hold: Hold, state: HoldState) -> None:
    c.execute("UPDATE holds SET state = ? WHERE id = ?", (state.value, hold.id))
    _free(c, hold.payer, hold.amount)


def _hold_of(row: Sequence[Any]) -> Hold:
    hold_id, operation_id, tenant_id, project_id, key_id, amount, state, expire_time, before, level, slot, incarnation = row
    return Hold(
        hold_id,
        operation_id,
        Payer(tenant_id, project_id, key_id),
        amount,
        HoldState(state),
        expire_time,
        before,
        level,
        Replica(slot, incarnation),
    )


def _tightest(c: sqlite3.Connection, payer: Payer) -> tuple[int | None, str]:
    """What is left of the tightest budget and its level; None: no budget is set."""
    found = dict(
        c.execute(
            "SELECT name, budget - spent - held FROM accounts WHERE name IN (?, ?, ?) AND budget IS NOT NULL", payer.accounts
        )
    )
    best: int | None = None
    level = ""
    for account, name in zip(payer.accounts, _LEVELS, strict=True):
        left = found.get(account)
        if left is not None and (best is None or left < best):
            best, level = left, name
    return best, level


def _limits_of(budget: int | None, requests: int | None, tokens: int | None, concurrency: int | None, models: str) -> Limits:
    return Limits(budget, requests, tokens, concurrency, models_from_json(models))


def _one_tenant(c: sqlite3.Connection, tenant_id: str) -> Tenant:
    return _tenants(c, "t.id = ?", (tenant_id,), 1)[0]


def _tenants(c: sqlite3.Connection, where: str, values: tuple[Any, ...], limit: int) -> list[Tenant]:
    rows = c.execute(
        "SELECT t.id, t.display_name, t.create_time, a.budget, t.requests_per_minute, t.tokens_per_minute, t.concurrency, "
        "t.model_limits, a.spent, a.held "
        f"FROM tenants t JOIN accounts a ON a.name = 'tenant/' || t.id WHERE {where} ORDER BY t.id LIMIT ?",
        (*values, limit),
    )
    return [Tenant(row[0], row[1], _limits_of(*row[3:8]), row[2], Balance(*row[8:10])) for row in rows]


def _projects(c: sqlite3.Connection, where: str, values: tuple[Any, ...], limit: int) -> list[Project]:
    rows = c.execute(
        "SELECT p.id, p.tenant_id, p.display_name, p.create_time, a.budget, p.requests_per_minute, p.tokens_per_minute, p.concurrency, "
        "p.model_limits, a.spent, a.held FROM projects p JOIN accounts a ON a.name = 'project/' || p.tenant_id || '/' || p.id "
        f"WHERE {where} ORDER BY p.id LIMIT ?",
        (*values, limit),
    )
    return [Project(row[0], row[1], row[2], _limits_of(*row[4:9]), row[3], Balance(*row[9:11])) for row in rows]


_KEY_COLUMNS: Final = (
    "k.id, k.sha256, k.tenant_id, k.project_id, k.display_name, k.secret_hint, k.scopes, k.allowed_models, k.create_time, k.expire_time, "
    "k.revoke_time, k.cache_namespace, a.budget, k.requests_per_minute, k.tokens_per_minute, k.concurrency, k.model_limits, a.spent, a.held"
)


def _keys(c: sqlite3.Connection, where: str, values: tuple[Any, ...], limit: int) -> list[Key]:
    rows = c.execute(
        f"SELECT {_KEY_COLUMNS} FROM keys k JOIN accounts a ON a.name = 'key/' || k.id WHERE {where} ORDER BY k.id LIMIT ?",
        (*values, limit),
    )
    return [
        Key(
            id=row[0],
            sha256=bytes(row[1]),
            tenant_id=row[2],
            project_id=row[3],
            display_name=row[4],
            secret_hint=row[5],
            scopes=tuple(json.loads(row[6])),
            allowed_models=tuple(json.loads(row[7])),
            limits=_limits_of(*row[12:17]),
            create_time=row[8],
            expire_time=row[9],
            revoke_time=row[10],
            cache_namespace=row[11],
            balance=Balance(*row[17:19]),
        )
        for row in rows
    ]


def _chain(c: sqlite3.Connection, where: str, value: str | bytes) -> Chain | None:
    keys = _keys(c, where, (value,), 1)
    if not keys:
        return None
    key = keys[0]
    project = _projects(c, "p.tenant_id = ? AND p.id = ?", (key.tenant_id, key.project_id), 1)[0]
    return Chain(key, project, _one_tenant(c, key.tenant_id))


def _usage_where(wanted: UsageFilter, groups: Sequence[str], after: Sequence[str]) -> tuple[str, tuple[Any, ...]]:
    conditions: list[str] = []
    values: list[Any] = []
    if after:
        conditions.append(f"({', '.join(groups)}) > ({', '.join('?' * len(groups))})")
        values += after
    for column, value in (
        ("tenant_id", wanted.tenant_id),
        ("project_id", wanted.project_id),
        ("key_id", wanted.key_id),
        ("model", wanted.model),
        ("provider", wanted.provider),
        ("task_type", wanted.task_type),
    ):
        if value:
            conditions.append(f"{column} = ?")
            values.append(value)
    if wanted.start is not None:
        conditions.append("start_micros >= ?")
        values.append(round(wanted.start * 1e6))
    if wanted.end is not None:
        conditions.append("start_micros < ?")
        values.append(round(wanted.end * 1e6))
    return ("WHERE " + " AND ".join(conditions) if conditions else ""), tuple(values)


_DAMAGED: Final = frozenset((sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB))


def _is_damage(error: sqlite3.DatabaseError) -> bool:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in _DAMAGED


def _lenient(data: bytes) -> str:
    return data.decode(errors="replace")


def _head(c: sqlite3.Connection) -> Head:
    row = c.execute("SELECT sequence, hash FROM journal ORDER BY sequence DESC LIMIT 1").fetchone()
    return Head(0, GENESIS) if row is None else Head(row[0], bytes(row[1]))


def verify_connection(c: sqlite3.Connection, expected: Head | None) -> Verdict:
    """Checks the ledger behind a connection. Damage is a problem; other errors of the database are raised."""
    # What is no UTF-8 is shown as wrong and isn't an error of whoever reads it.
    c.text_factory = _lenient
    audit = Audit(expected)
    try:
        c.execute("BEGIN")
        _read_all(c, audit)
    except sqlite3.DatabaseError as error:
        if not _is_damage(error):
            raise
        audit.problem(f"the database is damaged: {error}")
    finally:
        with contextlib.suppress(sqlite3.Error):
            c.execute("COMMIT")
    return audit.verdict()


def _read_all(c: sqlite3.Connection, audit: Audit) -> None:
    # Indices that lack an entry, and pages that can't be what they were.
    for (text,) in c.execute(f"PRAGMA integrity_check({MOST_PROBLEMS})").fetchall():
        if text != "ok":
            audit.problem(f"the database is damaged: {text}")
    for row in c.execute(f"SELECT sequence, hash, {_ENTRY_COLUMNS} FROM journal ORDER BY sequence"):
        audit.entry(row[0], row[1], Entry(*row[2:]))
    audit.entries_end()
    reserved = "SELECT tenant_id, project_id, key_id, amount FROM holds WHERE state = 'open' UNION ALL "
    reserved += "SELECT tenant_id, project_id, key_id, outstanding FROM leases"
    for *ids, amount in c.execute(reserved):
        audit.reserved(Payer(*ids), amount)
    audit.accounts(c.execute("SELECT name, spent, held FROM accounts"))


@contextlib.contextmanager
def file_lock(directory: Path) -> Iterator[None]:
    """Held by who writes to the ledger in `directory`. Raises RuntimeError when somebody has it."""
    with (directory / "ledger.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RuntimeError(
                f"another metering process uses {directory}: with SQLite there is exactly one; stop it, or use PostgreSQL"
            ) from None
        yield


@contextlib.asynccontextmanager
async def open_store(directory: Path) -> AsyncIterator[SqliteStore]:
    """The store in `directory`, made at the first use."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / FILE_NAME
    with file_lock(directory):
        try:
            store = await asyncio.to_thread(SqliteStore, path)
        except sqlite3.DatabaseError as error:
            if not _is_damage(error):
                raise
            raise RuntimeError(
                f"the ledger {path} is damaged: {error}. `sluice ledger verify --file {path}` says where; put a backup in its place "
                "with `sluice ledger restore`"
            ) from error
        try:
            yield store
        finally:
            await asyncio.to_thread(store.close)
