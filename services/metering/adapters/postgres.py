"""The ledger on PostgreSQL: any number of metering processes, each with group commit.

What waits in a process goes into one transaction: one lock, two reads of all rows that the operations need, the rules of money in memory
(books.py), one write of what changed, one commit. The lock is the database's own and ends with the transaction; it lets one process's
group pass at a time, so a group sees everything that was confirmed before it, and the journal has neither gaps nor forks. A process that
stands still with the lock is thrown out by the server after `_IDLE_SECONDS`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

import sqlalchemy as sa
from alembic import command
from alembic.config import Config as AlembicConfig
from alembic.script import ScriptDirectory
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from services.metering.accounts import (
    Balance,
    Key,
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
from services.metering.adapters.postgres_tables import ACCOUNTS, HOLDS, JOURNAL, KEYS, LEASES, PROJECTS, TENANTS
from services.metering.audit import Audit
from services.metering.books import (
    Account,
    Books,
    EndReservations,
    Expire,
    GrantSlice,
    Lease,
    Operation,
    Post,
    ReturnLease,
    TakeHold,
    VoidHold,
    Wanted,
)
from services.metering.errors import Exists, MeteringError, NotFound, StoreUnavailable
from services.metering.ledger import (
    GENESIS,
    PLATFORM,
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
)
from services.metering.ports import Chain, Change, Posted, UsageFilter, UsageRow

_MOST_PER_COMMIT: Final = 512
_MOST_EXPIRED: Final = 1000
_READERS: Final = 4
_REPORTERS: Final = 1
_CONNECT_SECONDS: Final = 5.0
_STATEMENT_SECONDS: Final = 10.0
_REPORT_SECONDS: Final = 600.0
_IDLE_SECONDS: Final = 2.0
_LOCK: Final = 0x534C5543
"""Key of the advisory lock that who changes the ledger holds."""
_MIGRATIONS: Final = Path(__file__).parent / "migrations"
_CORRUPTED: Final = "XX"
"""Class of the SQLSTATEs that say: what is stored is damaged."""

T = TypeVar("T")
Row = Sequence[Any]
Failed = Callable[[Exception], None]
"""Told of each error of the database; callers get StoreUnavailable, which says nothing of it."""


def _unheard(error: Exception) -> None:
    pass


def url_of(text: str) -> URL:
    """The driver's form of `postgresql://user:password@host:port/database?sslmode=require`. Raises ValueError, which has no password."""
    try:
        url = make_url(text)
    except ArgumentError:
        raise ValueError("must look like postgresql://user:password@host:port/database") from None
    if url.drivername not in {"postgresql", "postgres"} or not url.database:
        raise ValueError("must look like postgresql://user:password@host:port/database")
    # libpq's name for it, which everybody knows; the driver's is another one.
    query = {"ssl" if name == "sslmode" else name: value for name, value in url.query.items()}
    return url.set(drivername="postgresql+asyncpg", query=query)


_LIMITS: Final = ("requests_per_minute", "tokens_per_minute", "concurrency", "model_limits")
_TENANT_ROWS: Final = sa.select(
    TENANTS.c.id, TENANTS.c.display_name, TENANTS.c.create_time, ACCOUNTS.c.budget, *(TENANTS.c[name] for name in _LIMITS),
    ACCOUNTS.c.spent, ACCOUNTS.c.held,
).join(ACCOUNTS, ACCOUNTS.c.name == "tenant/" + TENANTS.c.id).order_by(TENANTS.c.id)  # fmt: skip
_PROJECT_ROWS: Final = sa.select(
    PROJECTS.c.id, PROJECTS.c.tenant_id, PROJECTS.c.display_name, PROJECTS.c.create_time, ACCOUNTS.c.budget,
    *(PROJECTS.c[name] for name in _LIMITS), ACCOUNTS.c.spent, ACCOUNTS.c.held,
).join(ACCOUNTS, ACCOUNTS.c.name == "project/" + PROJECTS.c.tenant_id + "/" + PROJECTS.c.id).order_by(PROJECTS.c.id)  # fmt: skip
_KEY_ROWS: Final = sa.select(
    KEYS.c.id, KEYS.c.sha256, KEYS.c.tenant_id, KEYS.c.project_id, KEYS.c.display_name, KEYS.c.secret_hint, KEYS.c.scopes,
    KEYS.c.allowed_models, KEYS.c.create_time, KEYS.c.expire_time, KEYS.c.revoke_time, KEYS.c.cache_namespace, ACCOUNTS.c.budget,
    *(KEYS.c[name] for name in _LIMITS), ACCOUNTS.c.spent, ACCOUNTS.c.held,
).join(ACCOUNTS, ACCOUNTS.c.name == "key/" + KEYS.c.id).order_by(KEYS.c.id)  # fmt: skip

_ENTRY_NAMES: Final = ", ".join(Entry._fields)
_HOLD_NAMES: Final = "id, operation_id, tenant_id, project_id, key_id, amount, state, expire_time, budget_before, budget_level, slot, incarnation"
_LEASE_NAMES: Final = "id, tenant_id, project_id, key_id, outstanding, expire_time, posted, slot, incarnation"
_TAKE_LOCK: Final = "SELECT pg_advisory_xact_lock($1::bigint)"
_READ_HOLDS: Final = f"SELECT {_HOLD_NAMES} FROM holds WHERE operation_id = ANY($1::text[]) OR id = ANY($2::text[])"
_READ_DUE_HOLDS: Final = (
    f"SELECT {_HOLD_NAMES} FROM holds WHERE state = 'open' AND expire_time <= $1::float8 LIMIT {_MOST_EXPIRED}"
)
_READ_HOLDS_OF: Final = f"SELECT {_HOLD_NAMES} FROM holds WHERE state = 'open' AND slot = ANY($1::text[])"
_READ_LEASES: Final = f"SELECT {_LEASE_NAMES} FROM leases WHERE id = ANY($1::text[])"
_READ_LEASES_OF: Final = f"SELECT {_LEASE_NAMES} FROM leases WHERE slot = ANY($1::text[])"
_READ_DUE_LEASES: Final = f"SELECT {_LEASE_NAMES} FROM leases WHERE expire_time <= $1::float8 LIMIT {_MOST_EXPIRED}"
_READ_ACCOUNTS: Final = "SELECT name, budget, spent, held FROM accounts WHERE name = ANY($1::text[])"
_READ_HEAD: Final = "SELECT sequence, hash FROM journal ORDER BY sequence DESC LIMIT 1"
_READ_POSTED: Final = "SELECT attempt_id FROM journal WHERE attempt_id = ANY($1::text[])"
_READ_OWNERS: Final = "SELECT key, operation_id FROM requests WHERE key = ANY($1::bytea[])"
_CLAIM: Final = "INSERT INTO requests SELECT * FROM unnest($1::bytea[], $2::text[], $3::float8[])"
_IS_FORGOTTEN: Final = "SELECT EXISTS (SELECT 1 FROM requests WHERE expire_time <= $1::float8)"
_FORGET: Final = "DELETE FROM requests WHERE key IN (SELECT key FROM requests WHERE expire_time <= $1::float8 LIMIT 10000)"
_IS_DUE: Final = (
    "SELECT EXISTS (SELECT 1 FROM holds WHERE state = 'open' AND expire_time <= $1::float8) "
    "OR EXISTS (SELECT 1 FROM leases WHERE expire_time <= $1::float8)"
)


def _unnested(types: Sequence[str], first: int) -> str:
    """`unnest` of one array parameter for each type, numbered from `first` on."""
    return f"unnest({', '.join(f'${number}::{kind}[]' for number, kind in enumerate(types, first))})"


_TYPES: Final = {sa.Text: "text", sa.BigInteger: "bigint", sa.Integer: "integer", sa.LargeBinary: "bytea", sa.Double: "float8"}


def _types(table: sa.Table, names: str) -> list[str]:
    return [_TYPES[type(table.c[name.strip()].type)] for name in names.split(",")]


def _write_statement() -> str:
    account_types = _types(ACCOUNTS, "name, spent, held")
    hold_types = _types(HOLDS, _HOLD_NAMES)
    lease_types = _types(LEASES, _LEASE_NAMES)
    entry_types = _types(JOURNAL, f"sequence, {_ENTRY_NAMES}, hash")
    holds_at = 1 + len(account_types)
    leases_at = holds_at + len(hold_types)
    ended_at = leases_at + len(lease_types)
    return f"""
        WITH changed_accounts AS (
          INSERT INTO accounts (name, spent, held) SELECT * FROM {_unnested(account_types, 1)}
          ON CONFLICT (name) DO UPDATE SET spent = EXCLUDED.spent, held = EXCLUDED.held
        ), changed_holds AS (
          INSERT INTO holds ({_HOLD_NAMES}) SELECT * FROM {_unnested(hold_types, holds_at)}
          ON CONFLICT (id) DO UPDATE SET state = EXCLUDED.state, expire_time = EXCLUDED.expire_time
        ), changed_leases AS (
          INSERT INTO leases ({_LEASE_NAMES}) SELECT * FROM {_unnested(lease_types, leases_at)}
          ON CONFLICT (id) DO UPDATE SET
            outstanding = EXCLUDED.outstanding, expire_time = EXCLUDED.expire_time, posted = EXCLUDED.posted
        ), ended_leases AS (
          DELETE FROM leases WHERE id = ANY(${ended_at}::text[])
        )
        INSERT INTO journal (sequence, {_ENTRY_NAMES}, hash) SELECT * FROM {_unnested(entry_types, ended_at + 1)}
    """


_WRITE: Final = _write_statement()
"""Everything that a group changed, in one statement: each one is a way to the server and back while others wait for the lock."""

_GROUPS: Final = {
    "tenant": "tenant_id",
    "project": "project_id",
    "key": "key_id",
    "model": "model",
    "provider": "provider",
    "task_type": 'task_type::text COLLATE "C"',
    "hour": 'to_char(to_timestamp(start_micros / 1000000) AT TIME ZONE \'UTC\', \'YYYY-MM-DD"T"HH24:00:00"Z"\') COLLATE "C"',
    "day": "to_char(to_timestamp(start_micros / 1000000) AT TIME ZONE 'UTC', 'YYYY-MM-DD') COLLATE \"C\"",
}
_ANSWERED: Final = f"outcome = {SUCCEEDED} AND debit <> '{PLATFORM}'"
_SOURCE: Final = "CASE WHEN input_tokens + output_tokens > 0 THEN usage_source END"


class _Job:
    __slots__ = ("future", "operation")

    def __init__(self, operation: Operation) -> None:
        self.operation = operation
        self.future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    def answer(self, result: Any) -> None:
        if self.future.done():
            return
        if isinstance(result, Exception):
            self.future.set_exception(result)
        else:
            self.future.set_result(result)


class PostgresStore:
    """Store on a PostgreSQL database. Use `open_store`."""

    def __init__(self, engine: AsyncEngine, reports: AsyncEngine, failed: Failed) -> None:
        self._engine = engine
        self._failed = failed
        # What takes time in proportion to the journal has connections of its own: no request waits behind it.
        self._reports = reports
        self._jobs: deque[_Job] = deque()
        self._waiting = asyncio.Event()
        self._closing = False
        self._writer = asyncio.create_task(self._run(), name="ledger")

    async def close(self) -> None:
        """Ends the writer after what waits is committed."""
        self._closing = True
        self._waiting.set()
        await self._writer

    # The writer.

    async def _run(self) -> None:
        while True:
            await self._waiting.wait()
            self._waiting.clear()
            while self._jobs:
                group = [self._jobs.popleft() for _ in range(min(len(self._jobs), _MOST_PER_COMMIT))]
                await self._commit(group)
            if self._closing:
                return

    async def _commit(self, group: list[_Job]) -> None:
        try:
            results = await self._group([job.operation for job in group])
        except Exception as error:  # noqa: BLE001 - the writer serves everybody and outlives a fault of one operation
            self._failed(error)
            if not _is_of_the_values(error):
                results = [StoreUnavailable() for _ in group]
            elif len(group) > 1:
                # Which of them has what the database can't take is found by asking for each by itself; the others are served.
                for job in group:
                    await self._commit([job])
                return
            else:
                results = [StoreUnavailable()]
        for job, result in zip(group, results, strict=True):
            job.answer(result)

    async def _group(self, operations: Sequence[Operation]) -> list[Any]:
        """Results of the operations, or what each was refused with; committed."""
        wanted = Wanted()
        for operation in operations:
            operation.wants(wanted)
        async with self._changing() as connection:
            books = await _read(connection, wanted)
            results: list[Any] = []
            for operation in operations:
                try:
                    results.append(operation.apply(books))
                except MeteringError as error:
                    results.append(error)
            await _write(connection, books)
        return results

    @contextlib.asynccontextmanager
    async def _changing(self) -> AsyncIterator[AsyncConnection]:
        """A transaction that nobody else changes the ledger in."""
        async with self._engine.begin() as connection:
            await connection.exec_driver_sql(_TAKE_LOCK, (_LOCK,))
            yield connection

    async def _written(self, operation: Operation) -> Any:
        if self._closing:
            raise StoreUnavailable
        job = _Job(operation)
        self._jobs.append(job)
        self._waiting.set()
        # A caller that goes away doesn't undo what is being committed.
        return await asyncio.shield(job.future)

    async def _changed(self, change: Callable[[AsyncConnection], Awaitable[T]]) -> T:
        """What is done by an administrator, by itself."""
        try:
            async with self._changing() as connection:
                return await change(connection)
        except (SQLAlchemyError, OSError) as error:
            self._failed(error)
            raise StoreUnavailable from error

    async def _found(self, read: Callable[[AsyncConnection], Awaitable[T]]) -> T:
        try:
            async with self._engine.connect() as connection:
                return await read(connection)
        except (SQLAlchemyError, OSError) as error:
            self._failed(error)
            raise StoreUnavailable from error

    async def _reported(self, read: Callable[[AsyncConnection], Awaitable[T]]) -> T:
        try:
            async with self._reports.connect() as connection:
                return await read(connection)
        except (SQLAlchemyError, OSError) as error:
            self._failed(error)
            raise StoreUnavailable from error

    # Store.

    async def ping(self) -> None:
        """See Store."""
        await self._found(lambda c: c.exec_driver_sql("SELECT 1"))

    async def chain_by_digest(self, sha256: bytes) -> Chain | None:
        """See Store."""
        return await self._found(lambda c: _chain(c, KEYS.c.sha256 == sha256))

    async def chain_by_key(self, key_id: str) -> Chain | None:
        """See Store."""
        return await self._found(lambda c: _chain(c, KEYS.c.id == key_id))

    async def create_tenant(self, tenant: Tenant, request_id: str) -> Tenant:
        """See Store."""

        async def change(c: AsyncConnection) -> Tenant:
            known = await c.scalar(sa.select(TENANTS.c.request_id).where(TENANTS.c.id == tenant.id))
            if known is not None:
                if not request_id or known != request_id:
                    raise Exists(f"tenants/{tenant.id}")
            else:
                values = {
                    "id": tenant.id,
                    "display_name": tenant.display_name,
                    "create_time": tenant.create_time,
                    "request_id": request_id,
                }
                await c.execute(sa.insert(TENANTS).values(**values, **_limits(tenant.limits)))
                await _open_account(c, tenant_account(tenant.id), tenant.limits)
                default = {"tenant_id": tenant.id, "id": "default", "display_name": "", "create_time": tenant.create_time}
                await c.execute(sa.insert(PROJECTS).values(**default, request_id=request_id))
                await _open_account(c, project_account(tenant.id, "default"), Limits())
            return await _one_tenant(c, tenant.id)

        return await self._changed(change)

    async def tenant(self, tenant_id: str) -> Tenant | None:
        """See Store."""
        found = await self._found(lambda c: _tenants(c, TENANTS.c.id == tenant_id, 1))
        return found[0] if found else None

    async def tenants(self, after: str, limit: int) -> list[Tenant]:
        """See Store."""
        return await self._found(lambda c: _tenants(c, TENANTS.c.id > after, limit))

    async def update_tenant(self, tenant_id: str, display_name: str | None, change: Change) -> Tenant:
        """See Store."""

        async def changed(c: AsyncConnection) -> Tenant:
            found = await _tenants(c, TENANTS.c.id == tenant_id, 1)
            if not found:
                raise NotFound(f"tenants/{tenant_id}")
            limits = change(found[0].limits)
            name = found[0].display_name if display_name is None else display_name
            await c.execute(sa.update(TENANTS).where(TENANTS.c.id == tenant_id).values(display_name=name, **_limits(limits)))
            await _set_budget(c, tenant_account(tenant_id), limits)
            return await _one_tenant(c, tenant_id)

        return await self._changed(changed)

    async def create_project(self, project: Project, request_id: str) -> Project:
        """See Store."""
        one = sa.and_(PROJECTS.c.tenant_id == project.tenant_id, PROJECTS.c.id == project.id)

        async def change(c: AsyncConnection) -> Project:
            if await c.scalar(sa.select(TENANTS.c.id).where(TENANTS.c.id == project.tenant_id)) is None:
                raise NotFound(f"tenants/{project.tenant_id}")
            known = await c.scalar(sa.select(PROJECTS.c.request_id).where(one))
            if known is not None:
                if not request_id or known != request_id:
                    raise Exists(f"tenants/{project.tenant_id}/projects/{project.id}")
            else:
                values = {
                    "tenant_id": project.tenant_id,
                    "id": project.id,
                    "display_name": project.display_name,
                    "create_time": project.create_time,
                    "request_id": request_id,
                }
                await c.execute(sa.insert(PROJECTS).values(**values, **_limits(project.limits)))
                await _open_account(c, project_account(project.tenant_id, project.id), project.limits)
            return (await _projects(c, one, 1))[0]

        return await self._changed(change)

    async def project(self, tenant_id: str, project_id: str) -> Project | None:
        """See Store."""
        one = sa.and_(PROJECTS.c.tenant_id == tenant_id, PROJECTS.c.id == project_id)
        found = await self._found(lambda c: _projects(c, one, 1))
        return found[0] if found else None

    async def projects(self, tenant_id: str, after: str, limit: int) -> list[Project]:
        """See Store."""
        return await self._found(
            lambda c: _projects(c, sa.and_(PROJECTS.c.tenant_id == tenant_id, PROJECTS.c.id > after), limit)
        )

    async def update_project(self, tenant_id: str, project_id: str, display_name: str | None, change: Change) -> Project:
        """See Store."""
        one = sa.and_(PROJECTS.c.tenant_id == tenant_id, PROJECTS.c.id == project_id)

        async def changed(c: AsyncConnection) -> Project:
            found = await _projects(c, one, 1)
            if not found:
                raise NotFound(f"tenants/{tenant_id}/projects/{project_id}")
            limits = change(found[0].limits)
            name = found[0].display_name if display_name is None else display_name
            await c.execute(sa.update(PROJECTS).where(one).values(display_name=name, **_limits(limits)))
            await _set_budget(c, project_account(tenant_id, project_id), limits)
            return (await _projects(c, one, 1))[0]

        return await self._changed(changed)

    async def create_key(self, key: Key) -> Key:
        """See Store."""

        async def change(c: AsyncConnection) -> Key:
            owner = sa.and_(PROJECTS.c.tenant_id == key.tenant_id, PROJECTS.c.id == key.project_id)
            if await c.scalar(sa.select(PROJECTS.c.id).where(owner)) is None:
                raise NotFound(f"tenants/{key.tenant_id}/projects/{key.project_id}")
            taken = sa.or_(KEYS.c.id == key.id, KEYS.c.sha256 == key.sha256)
            if await c.scalar(sa.select(KEYS.c.id).where(taken).limit(1)) is not None:
                raise Exists(f"keys/{key.id}")
            await c.execute(
                sa.insert(KEYS).values(
                    id=key.id,
                    sha256=key.sha256,
                    tenant_id=key.tenant_id,
                    project_id=key.project_id,
                    display_name=key.display_name,
                    secret_hint=key.secret_hint,
                    scopes=json.dumps(key.scopes),
                    allowed_models=json.dumps(key.allowed_models),
                    create_time=key.create_time,
                    expire_time=key.expire_time,
                    revoke_time=key.revoke_time,
                    cache_namespace=key.cache_namespace,
                    **_limits(key.limits),
                )
            )
            await _open_account(c, key_account(key.id), key.limits)
            return (await _keys(c, KEYS.c.id == key.id, 1))[0]

        return await self._changed(change)

    async def keys(self, tenant_id: str, project_id: str, after: str, limit: int) -> list[Key]:
        """See Store."""
        where = sa.and_(KEYS.c.tenant_id == tenant_id, KEYS.c.id > after)
        if project_id:
            where = sa.and_(where, KEYS.c.project_id == project_id)
        return await self._found(lambda c: _keys(c, where, limit))

    async def revoke_key(self, key_id: str, now: float) -> Key:
        """See Store."""

        async def change(c: AsyncConnection) -> Key:
            active = sa.and_(KEYS.c.id == key_id, KEYS.c.revoke_time.is_(None))
            await c.execute(sa.update(KEYS).where(active).values(revoke_time=now))
            found = await _keys(c, KEYS.c.id == key_id, 1)
            if not found:
                raise NotFound(f"keys/{key_id}")
            return found[0]

        return await self._changed(change)

    async def hold(self, operation_id: str, payer: Payer, amount: int, least: int, expire_time: float, holder: Replica) -> Hold:
        """See Store."""
        hold: Hold = await self._written(TakeHold(operation_id, payer, amount, least, expire_time, holder))
        return hold

    async def void_hold(self, hold_id: str, expire_time: float | None = None) -> HoldState:
        """See Store."""
        state: HoldState = await self._written(VoidHold(hold_id, expire_time))
        return state

    async def grant_slice(
        self, lease_id: str, payer: Payer, wanted: int, reserve: int, expire_time: float, holder: Replica
    ) -> Slice:
        """See Store."""
        granted: Slice = await self._written(GrantSlice(lease_id, payer, wanted, reserve, expire_time, holder))
        return granted

    async def return_lease(self, lease_id: str, owed: int, expire_time: float) -> None:
        """See Store."""
        await self._written(ReturnLease(lease_id, owed, expire_time))

    async def end_reservations(self, survivor: Replica, expire_time: float) -> int:
        """See Store."""
        if not survivor.slot:
            return 0
        ended: int = await self._written(EndReservations(survivor, expire_time))
        return ended

    async def post(self, settlements: Sequence[Settlement]) -> list[PostState]:
        """See Store."""
        states: list[PostState] = await self._written(Post(settlements))
        return states

    async def expire(self, now: float) -> int:
        """See Store."""
        if await self._found(lambda c: _scalar(c, _IS_FORGOTTEN, now)):
            await self._changed(lambda c: c.exec_driver_sql(_FORGET, (now,)))
        due = await self._found(lambda c: _scalar(c, _IS_DUE, now))
        if not due:
            return 0
        count: int = await self._written(Expire(now))
        return count

    async def usage(self, wanted: UsageFilter, group_by: Sequence[str], after: Sequence[str], limit: int) -> list[UsageRow]:
        """See Store."""
        groups = [_GROUPS[name] for name in group_by]
        where, values = _usage_where(wanted, groups, after)
        columns = ", ".join([*groups, ""]) if groups else ""
        places = ", ".join(str(number) for number in range(1, len(groups) + 1))
        grouping = f"GROUP BY {places} ORDER BY {places}" if groups else ""
        # A request is counted at its first attempt or its cache hit; hits are those with a status of their own.
        statement = f"""
            SELECT {columns} COUNT(DISTINCT operation_id), COUNT(DISTINCT operation_id) FILTER (WHERE {_ANSWERED}),
              COUNT(*) FILTER (WHERE cache_status > 0),
              COUNT(*) FILTER (WHERE cache_status = 0), COUNT(*) FILTER (WHERE cache_status = 0 AND attempt_number > 1),
              SUM(input_tokens), SUM(cached_tokens), SUM(cache_write_tokens), SUM(output_tokens), SUM(reasoning_tokens), SUM(images),
              SUM(CASE WHEN debit = '{PLATFORM}' THEN 0 ELSE amount END), SUM(saved),
              CASE WHEN MIN({_SOURCE}) > 0 THEN MAX({_SOURCE}) ELSE 0 END
            FROM journal {where} {grouping} LIMIT ${len(values) + 1}::bigint
        """

        async def read(c: AsyncConnection) -> list[UsageRow]:
            rows = (await c.exec_driver_sql(statement, (*values, limit))).all()
            count = len(groups)
            return [
                UsageRow(tuple(map(str, row[:count])), *(int(value or 0) for value in row[count:]))
                for row in rows
                if row[count]
            ]

        return await self._reported(read)

    async def entries(self, tenant_id: str, operation_id: str, before: int | None, limit: int) -> list[Posted]:
        """See Store."""
        columns = JOURNAL.c
        statement = sa.select(columns.sequence, *(columns[name] for name in Entry._fields))
        if before is not None:
            statement = statement.where(columns.sequence < before)
        if tenant_id:
            statement = statement.where(columns.tenant_id == tenant_id)
        if operation_id:
            # Every id of an attempt is `<operation>/...`, and "0" comes after "/".
            statement = statement.where(
                columns.attempt_id > f"{operation_id}/",
                columns.attempt_id < f"{operation_id}0",
                columns.operation_id == operation_id,
            )
        statement = statement.order_by(columns.sequence.desc()).limit(limit)

        async def read(c: AsyncConnection) -> list[Posted]:
            return [Posted(row[0], Entry(*row[1:])) for row in (await c.execute(statement)).all()]

        return await self._reported(read)

    async def journal(self, wanted: UsageFilter, after: int, limit: int) -> list[Posted]:
        """See Store."""
        where, values = _usage_where(wanted, [], ())
        place = f"{where} AND" if where else "WHERE"
        columns = ", ".join(Entry._fields)
        statement = (
            f"SELECT sequence, {columns} FROM journal {place} sequence > ${len(values) + 1}::bigint "
            f"ORDER BY sequence LIMIT ${len(values) + 2}::bigint"
        )

        async def read(c: AsyncConnection) -> list[Posted]:
            rows = (await c.exec_driver_sql(statement, (*values, after, limit))).all()
            return [Posted(row[0], Entry._make(row[1:])) for row in rows]

        return await self._reported(read)

    async def head(self) -> Head:
        """See Store."""
        return await self._found(_head)

    async def verify(self, expected: Head | None = None) -> Verdict:
        """See Store."""
        audit = Audit(expected)
        try:
            async with self._reports.begin() as connection:
                # The journal, the reservations and the accounts as of one moment.
                await connection.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
                await _read_all(connection, audit)
        except (SQLAlchemyError, OSError) as error:
            self._failed(error)
            if not sqlstate(error).startswith(_CORRUPTED):
                raise StoreUnavailable from error
            audit.problem(f"the database is damaged: {getattr(error, 'orig', error)}")
        return audit.verdict()


def sqlstate(error: BaseException) -> str:
    """The SQLSTATE of an error; empty when the server didn't say it."""
    original = getattr(error, "orig", None)
    return str(getattr(original, "sqlstate", None) or "")


def _is_of_the_values(error: Exception) -> bool:
    """Whether a group failed for what is in it, rather than for the database's state or the way to it."""
    if isinstance(error, DBAPIError):
        if error.connection_invalidated:
            return False
        state = sqlstate(error)
        # Without a state it is the driver that could not send a value. 22: data exceptions. 23: constraints.
        return state[:2] in {"", "22", "23"} and not isinstance(getattr(error, "orig", None), OSError)
    return not isinstance(error, (SQLAlchemyError, OSError))


async def _scalar(c: AsyncConnection, statement: str, *values: Any) -> Any:
    return (await c.exec_driver_sql(statement, values)).scalar()


async def _head(c: AsyncConnection) -> Head:
    row: Row | None = (await c.exec_driver_sql(_READ_HEAD)).first()
    return Head(0, GENESIS) if row is None else Head(row[0], row[1])


async def _read(c: AsyncConnection, wanted: Wanted) -> Books:
    """All rows that a group needs, as they are now that the lock is ours."""
    holds: list[Hold] = []
    leases: dict[str, Lease] = {}
    if wanted.operation_ids or wanted.hold_ids:
        found = await c.exec_driver_sql(_READ_HOLDS, (list(wanted.operation_ids), list(wanted.hold_ids)))
        holds += map(_hold_of, found)
    if wanted.lease_ids:
        leases |= map(_lease_of, await c.exec_driver_sql(_READ_LEASES, (list(wanted.lease_ids),)))
    if wanted.slots:
        leases |= map(_lease_of, await c.exec_driver_sql(_READ_LEASES_OF, (list(wanted.slots),)))
        holds += map(_hold_of, await c.exec_driver_sql(_READ_HOLDS_OF, (list(wanted.slots),)))
    if wanted.due is not None:
        holds += map(_hold_of, await c.exec_driver_sql(_READ_DUE_HOLDS, (wanted.due,)))
        leases |= map(_lease_of, await c.exec_driver_sql(_READ_DUE_LEASES, (wanted.due,)))
    payers = wanted.payers | {hold.payer for hold in holds} | {lease.payer for lease in leases.values()}
    names = list({name for payer in payers for name in payer.accounts})
    accounts: dict[str, Account] = {}
    if names:
        accounts = {row[0]: Account(*row[1:]) for row in await c.exec_driver_sql(_READ_ACCOUNTS, (names,))}
    head, posted = Head(0, GENESIS), set[str]()
    if wanted.attempt_ids:
        head = await _head(c)
        posted = {row[0] for row in await c.exec_driver_sql(_READ_POSTED, (list(wanted.attempt_ids),))}
    owners: dict[bytes, str] = {}
    if wanted.request_keys:
        rows: Iterable[Row] = await c.exec_driver_sql(_READ_OWNERS, (list(wanted.request_keys),))
        owners = {row[0]: row[1] for row in rows}
    return Books(head, accounts, holds, leases, posted, owners)


async def _write(c: AsyncConnection, books: Books) -> None:
    """All that changed."""
    ended = [name for name in books.changed_leases if name not in books.leases]
    if not (books.changed_accounts or books.changed_holds or books.changed_leases or books.entries):
        return
    accounts = [(name, books.accounts[name].spent, books.accounts[name].held) for name in sorted(books.changed_accounts)]
    holds = [_hold_row(books.holds[name]) for name in sorted(books.changed_holds)]
    leases = [_lease_row(name, books.leases[name]) for name in sorted(books.changed_leases) if name in books.leases]
    first = books.head.sequence - len(books.entries) + 1
    entries = [(number, *entry, hashed) for number, (entry, hashed) in enumerate(books.entries, first)]
    values: list[Any] = [*_columns(accounts, 3), *_columns(holds, 12), *_columns(leases, 9), ended]
    values += _columns(entries, len(Entry._fields) + 2)
    await c.exec_driver_sql(_WRITE, tuple(values))
    if books.claims:
        await c.exec_driver_sql(_CLAIM, tuple(_columns(books.claims, 3)))


def _columns(rows: Sequence[Row], width: int) -> list[list[Any]]:
    return [list(column) for column in zip(*rows, strict=True)] if rows else [[] for _ in range(width)]


def _hold_of(row: Row) -> Hold:
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


def _hold_row(hold: Hold) -> Row:
    payer = hold.payer
    return (
        hold.id, hold.operation_id, payer.tenant_id, payer.project_id, payer.key_id, hold.amount, hold.state.value, hold.expire_time,
        hold.budget_before, hold.budget_level, hold.holder.slot, hold.holder.incarnation,
    )  # fmt: skip


def _lease_of(row: Row) -> tuple[str, Lease]:
    lease_id, tenant_id, project_id, key_id, outstanding, expire_time, posted, slot, incarnation = row
    return lease_id, Lease(Payer(tenant_id, project_id, key_id), outstanding, expire_time, Replica(slot, incarnation), posted)


def _lease_row(lease_id: str, lease: Lease) -> Row:
    payer, holder = lease.payer, lease.holder
    return (
        lease_id,
        *(payer.tenant_id, payer.project_id, payer.key_id),
        *(lease.outstanding, lease.expire_time, lease.posted),
        *(holder.slot, holder.incarnation),
    )


async def _read_all(c: AsyncConnection, audit: Audit) -> None:
    columns = JOURNAL.c
    rows = await c.stream(
        sa.select(columns.sequence, columns.hash, *(columns[name] for name in Entry._fields)).order_by(columns.sequence)
    )
    async for row in rows:
        audit.entry(row[0], row[1], Entry(*row[2:]))
    audit.entries_end()
    ids = ("tenant_id", "project_id", "key_id")
    reservations: tuple[sa.Select[Any], ...] = (
        sa.select(*(HOLDS.c[name] for name in ids), HOLDS.c.amount).where(HOLDS.c.state == HoldState.OPEN.value),
        sa.select(*(LEASES.c[name] for name in ids), LEASES.c.outstanding),
    )
    for statement in reservations:
        async for row in await c.stream(statement):
            audit.reserved(Payer(row[0], row[1], row[2]), row[3])
    # Sorted out in memory, as the sums that they are compared with are.
    accounts = await c.execute(sa.select(ACCOUNTS.c.name, ACCOUNTS.c.spent, ACCOUNTS.c.held))
    audit.accounts((row[0], row[1], row[2]) for row in accounts)


def _limits(limits: Limits) -> dict[str, int | str | None]:
    rates = (limits.requests_per_minute, limits.tokens_per_minute, limits.concurrency)
    return dict(zip(_LIMITS, (*rates, models_to_json(limits.models)), strict=True))


def _limits_of(row: Row) -> Limits:
    budget, requests, tokens, concurrency, models = row
    return Limits(budget, requests, tokens, concurrency, models_from_json(models))


async def _open_account(c: AsyncConnection, name: str, limits: Limits) -> None:
    await c.exec_driver_sql(
        "INSERT INTO accounts (name, budget) VALUES ($1::text, $2::bigint) ON CONFLICT (name) DO UPDATE SET budget = EXCLUDED.budget",
        (name, limits.budget_nano_usd),
    )


async def _set_budget(c: AsyncConnection, name: str, limits: Limits) -> None:
    await c.execute(sa.update(ACCOUNTS).where(ACCOUNTS.c.name == name).values(budget=limits.budget_nano_usd))


async def _one_tenant(c: AsyncConnection, tenant_id: str) -> Tenant:
    return (await _tenants(c, TENANTS.c.id == tenant_id, 1))[0]


async def _tenants(c: AsyncConnection, where: sa.ColumnElement[bool], limit: int) -> list[Tenant]:
    rows = await c.execute(_TENANT_ROWS.where(where).limit(limit))
    return [Tenant(row[0], row[1], _limits_of(row[3:8]), row[2], Balance(*row[8:10])) for row in rows]


async def _projects(c: AsyncConnection, where: sa.ColumnElement[bool], limit: int) -> list[Project]:
    rows = await c.execute(_PROJECT_ROWS.where(where).limit(limit))
    return [Project(row[0], row[1], row[2], _limits_of(row[4:9]), row[3], Balance(*row[9:11])) for row in rows]


async def _keys(c: AsyncConnection, where: sa.ColumnElement[bool], limit: int) -> list[Key]:
    return [
        Key(
            id=row[0],
            sha256=row[1],
            tenant_id=row[2],
            project_id=row[3],
            display_name=row[4],
            secret_hint=row[5],
            scopes=tuple(json.loads(row[6])),
            allowed_models=tuple(json.loads(row[7])),
            limits=_limits_of(row[12:17]),
            create_time=row[8],
            expire_time=row[9],
            revoke_time=row[10],
            cache_namespace=row[11],
            balance=Balance(*row[17:19]),
        )
        for row in await c.execute(_KEY_ROWS.where(where).limit(limit))
    ]


async def _chain(c: AsyncConnection, where: sa.ColumnElement[bool]) -> Chain | None:
    keys = await _keys(c, where, 1)
    if not keys:
        return None
    key = keys[0]
    one = sa.and_(PROJECTS.c.tenant_id == key.tenant_id, PROJECTS.c.id == key.project_id)
    return Chain(key, (await _projects(c, one, 1))[0], await _one_tenant(c, key.tenant_id))


def _usage_where(wanted: UsageFilter, groups: Sequence[str], after: Sequence[str]) -> tuple[str, tuple[Any, ...]]:
    conditions: list[str] = []
    values: list[Any] = []

    def add(condition: str, value: Any) -> None:
        values.append(value)
        conditions.append(condition.format(f"${len(values)}"))

    if after:
        values += after
        places = ", ".join(f"${number}::text" for number in range(1, len(values) + 1))
        conditions.append(f"({', '.join(groups)}) > ({places})")
    for column in ("tenant_id", "project_id", "key_id", "model", "provider"):
        if value := getattr(wanted, column):
            add(column + " = {}::text", value)
    if wanted.task_type:
        add("task_type = {}::bigint", wanted.task_type)
    if wanted.start is not None:
        add("start_micros >= {}::bigint", round(wanted.start * 1e6))
    if wanted.end is not None:
        add("start_micros < {}::bigint", round(wanted.end * 1e6))
    return ("WHERE " + " AND ".join(conditions) if conditions else ""), tuple(values)


def _migrate(connection: sa.Connection) -> None:
    """Brings the schema to the version of the code. Raises RuntimeError when it is newer."""
    config = AlembicConfig()
    config.set_main_option("script_location", str(_MIGRATIONS))
    config.attributes["connection"] = connection
    known = {revision.revision for revision in ScriptDirectory.from_config(config).walk_revisions()}
    if sa.inspect(connection).has_table("alembic_version"):
        found = connection.scalar(sa.text("SELECT version_num FROM alembic_version"))
        if found is not None and found not in known:
            raise RuntimeError(f"the ledger has schema version {found}, which this Sluice doesn't know; use a newer one")
    command.upgrade(config, "head")


@contextlib.asynccontextmanager
async def open_store(url: URL, failed: Failed = _unheard) -> AsyncIterator[PostgresStore]:
    """The store in a database, whose tables are made at the first use. `url` by `url_of`; `failed` hears of the database's errors.

    Raises StoreUnavailable.
    """
    engine = _engine(url, size=_READERS, seconds=_STATEMENT_SECONDS, is_indexed=True)
    reports = _engine(url, size=_REPORTERS, seconds=_REPORT_SECONDS, is_indexed=False)
    try:
        try:
            async with engine.begin() as connection:
                await connection.exec_driver_sql(_TAKE_LOCK, (_LOCK,))
                await connection.run_sync(_migrate)
        except (SQLAlchemyError, OSError) as error:
            failed(error)
            raise StoreUnavailable from error
        store = PostgresStore(engine, reports, failed)
        try:
            yield store
        finally:
            await store.close()
    finally:
        await reports.dispose()
        await engine.dispose()


def _engine(url: URL, *, size: int, seconds: float, is_indexed: bool) -> AsyncEngine:
    """Up to twice `size` connections, whose statements take up to `seconds`."""
    settings = {
        "application_name": "sluice-metering",
        "synchronous_commit": "on",
        "lock_timeout": f"{_STATEMENT_SECONDS * 1000:.0f}",
        "idle_in_transaction_session_timeout": f"{_IDLE_SECONDS * 1000:.0f}",
        # Every statement of a request finds its rows by an index. Without this a table that grew since it was last looked at by the
        # server is read whole: measured, 6 ms instead of 0.2 for a group of 64.
        **({"enable_seqscan": "off"} if is_indexed else {}),
    }
    return create_async_engine(
        url,
        pool_size=size,
        max_overflow=size,
        pool_timeout=_CONNECT_SECONDS,
        pool_use_lifo=True,
        connect_args={"timeout": _CONNECT_SECONDS, "command_timeout": seconds, "server_settings": settings},
        # Values are people's ids and keys' digests: never in an error's text.
        hide_parameters=True,
    )
