"""Ledgers that are damaged past their stores, to see whether the check finds it."""

from __future__ import annotations

import asyncio
import contextlib
import random
import shutil
import sqlite3
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Final

import asyncpg

from services.metering.accounts import Limits, Payer, Tenant
from services.metering.adapters import postgres as postgres_store
from services.metering.adapters import sqlite_files
from services.metering.adapters.sqlite import FILE_NAME, open_store
from services.metering.ledger import Entry, Head, Verdict
from services.metering.ports import Store
from tests import postgres
from tests.conformance.ledger.examples import NOW, key, settlement
from tests.proof.registry import Context, Result

_ROWS: Final = 300
_KEYS: Final = 4
_LONGEST_ROW: Final = 1000
# What puts the accounts right again, as who takes money away would.
_BALANCE: Final = tuple(
    f"UPDATE accounts SET spent = (SELECT COALESCE(SUM(amount), 0) FROM journal WHERE {name} = accounts.name) "
    f"WHERE name LIKE '{level}/%'"
    for level, name in (
        ("key", "'key/' || key_id"),
        ("project", "'project/' || tenant_id || '/' || project_id"),
        ("tenant", "'tenant/' || tenant_id"),
    )
)


class Ledger(ABC):
    """A filled ledger that nobody uses; `copied` gives one to be damaged."""

    head: Head

    @abstractmethod
    def copied(self) -> AbstractContextManager[Ledger]:
        """A copy, thrown away in the end."""

    @abstractmethod
    def value(self, column: str, sequence: int) -> Any:
        """What the journal has there."""

    @abstractmethod
    def change(self, statements: Sequence[tuple[str, Sequence[Any]]]) -> None:
        """Runs SQL with the guards off; a mark for the n-th value is `$n`."""

    @abstractmethod
    def verdict(self, expected: Head | None) -> Verdict:
        """The check."""

    def change_byte(self, rng: random.Random) -> str:
        """Changes a byte of a row in whatever way the store has; says how."""
        return change_value(self, rng)


async def fill(store: Store, seed: int) -> Head:
    """Entries of several keys."""
    rng = random.Random(seed)
    payers = [Payer("acme", "default", f"key-{number}") for number in range(_KEYS)]
    await store.create_tenant(Tenant("acme", "Acme", Limits(), NOW), "")
    for payer in payers:
        await store.create_key(key(payer.key_id))
    posted = [
        settlement(
            f"op-{number}/1",
            amount=rng.randrange(1, 10_000_000),
            payer=rng.choice(payers),
            model=f"a/{rng.choice('xyz')}",
            tokens=rng.randrange(5000),
            start_micros=int((NOW + number) * 1e6),
        )
        for number in range(_ROWS)
    ]
    for start in range(0, _ROWS, 7):
        await store.post(posted[start : start + 7])
    return await store.head()


class SqliteLedger(Ledger):
    """A directory with a ledger's file."""

    def __init__(self, directory: Path, head: Head) -> None:
        self.head = head
        self._path = directory / FILE_NAME

    @classmethod
    def made(cls, directory: Path) -> SqliteLedger:
        """A filled one."""

        async def make() -> Head:
            async with open_store(directory) as store:
                return await fill(store, 1)

        return cls(directory, asyncio.run(make()))

    @contextlib.contextmanager
    def copied(self) -> Iterator[Ledger]:
        """See Ledger."""
        with tempfile.TemporaryDirectory() as name:
            shutil.copy(self._path, name)
            yield SqliteLedger(Path(name), self.head)

    def value(self, column: str, sequence: int) -> Any:
        """See Ledger."""
        with contextlib.closing(sqlite3.connect(self._path)) as connection:
            return connection.execute(f"SELECT {column} FROM journal WHERE sequence = ?", (sequence,)).fetchone()[0]

    def change(self, statements: Sequence[tuple[str, Sequence[Any]]]) -> None:
        """See Ledger."""
        with contextlib.closing(sqlite3.connect(self._path)) as connection:
            triggers = connection.execute("SELECT name, sql FROM sqlite_schema WHERE type = 'trigger'").fetchall()
            for name, _ in triggers:
                connection.execute(f"DROP TRIGGER {name}")
            for statement, values in statements:
                connection.execute(statement.replace("$", "?"), values)
            for _, statement in triggers:
                connection.execute(statement)
            connection.commit()

    def verdict(self, expected: Head | None) -> Verdict:
        """See Ledger."""
        return sqlite_files.verify_file(self._path, expected)

    def change_byte(self, rng: random.Random) -> str:
        """A byte of a row as it lies in the file, the row's own head included; or of a value, by SQL."""
        if rng.random() < 0.5:
            return change_value(self, rng)
        sequence = rng.randrange(1, _ROWS + 1)
        attempt, hashed = self.value("attempt_id", sequence), self.value("hash", sequence)
        data = bytearray(self._path.read_bytes())
        end = data.index(hashed) + len(hashed)
        # Before the first value stand the row's length, its number, and a byte or more on the kind of each value.
        start = data.rindex(attempt.encode(), max(0, end - _LONGEST_ROW), end) - len(Entry._fields) - 2
        place = rng.randrange(start, end)
        old = data[place]
        data[place] ^= rng.randrange(1, 256)
        self._path.write_bytes(data)
        return f"byte {place - start} of {end - start} of entry {sequence}: {old:#04x} -> {data[place]:#04x}"


class PostgresLedger(Ledger):
    """A database with a ledger."""

    def __init__(self, server: postgres.Server, url: str, head: Head) -> None:
        self.head = head
        self._server = server
        self._url = url

    @classmethod
    def made(cls, server: postgres.Server) -> PostgresLedger:
        """A filled one."""

        async def make() -> tuple[str, Head]:
            url = await server.new_database()
            async with postgres_store.open_store(postgres_store.url_of(url)) as store:
                return url, await fill(store, 1)

        return cls(server, *asyncio.run(make()))

    @contextlib.contextmanager
    def copied(self) -> Iterator[Ledger]:
        """See Ledger."""
        yield PostgresLedger(self._server, asyncio.run(self._server.new_database(self._url)), self.head)

    def value(self, column: str, sequence: int) -> Any:
        """See Ledger."""

        async def read() -> Any:
            async with postgres.connected(self._url) as connection:
                return await connection.fetchval(f"SELECT {column} FROM journal WHERE sequence = $1", sequence)

        return asyncio.run(read())

    def change(self, statements: Sequence[tuple[str, Sequence[Any]]]) -> None:
        """See Ledger."""

        async def run(connection: asyncpg.Connection) -> None:
            await connection.execute("ALTER TABLE journal DISABLE TRIGGER USER")
            for statement, values in statements:
                await connection.execute(statement, *values)
            await connection.execute("ALTER TABLE journal ENABLE TRIGGER USER")

        async def change() -> None:
            async with postgres.connected(self._url) as connection:
                await run(connection)

        asyncio.run(change())

    def verdict(self, expected: Head | None) -> Verdict:
        """See Ledger."""

        async def check() -> Verdict:
            async with postgres_store.open_store(postgres_store.url_of(self._url)) as store:
                return await store.verify(expected)

        return asyncio.run(check())


def change_value(ledger: Ledger, rng: random.Random) -> str:
    """Changes a bit of a value by SQL, and puts the accounts right."""
    column = rng.choice([*Entry._fields, "hash"])
    sequence = rng.randrange(1, _ROWS + 1)
    old = ledger.value(column, sequence)
    new: str | int | bytes
    if isinstance(old, int):
        new = old ^ (1 << rng.randrange(8))
    else:
        data = bytearray(old.encode() if isinstance(old, str) else old) or bytearray(b"@")
        # Text stays text: of its bits the lower ones.
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(5 if isinstance(old, str) else 8)
        new = data.decode() if isinstance(old, str) else bytes(data)
    ledger.change([(f"UPDATE journal SET {column} = $1 WHERE sequence = $2", (new, sequence)), *_balanced()])
    return f"{column} of entry {sequence}: {old!r} -> {new!r}"


def _balanced() -> list[tuple[str, Sequence[Any]]]:
    return [(statement, ()) for statement in _BALANCE]


def _change(ledger: Ledger, rng: random.Random) -> str:
    return ledger.change_byte(rng)


def _remove(ledger: Ledger, rng: random.Random) -> str:
    sequence, closed = rng.randrange(1, _ROWS), rng.random() < 0.5
    statements: list[tuple[str, Sequence[Any]]] = [("DELETE FROM journal WHERE sequence = $1", (sequence,))]
    if closed:
        # Who takes a row away may close the gap.
        statements += [
            ("UPDATE journal SET sequence = -sequence WHERE sequence > $1", (sequence,)),
            ("UPDATE journal SET sequence = -sequence - 1 WHERE sequence < 0", ()),
        ]
    ledger.change([*statements, *_balanced()])
    return f"entry {sequence} removed" + " and the others renumbered" * closed


def _swap(ledger: Ledger, rng: random.Random) -> str:
    first, second = rng.sample(range(1, _ROWS + 1), 2)
    move = "UPDATE journal SET sequence = $1 WHERE sequence = $2"
    ledger.change([(move, (-1, first)), (move, (first, second)), (move, (second, -1))])
    return f"entries {first} and {second} swapped"


def _cut(ledger: Ledger, rng: random.Random) -> str:
    rows = rng.randrange(1, _ROWS)
    ledger.change([("DELETE FROM journal WHERE sequence > $1", (_ROWS - rows,)), *_balanced()])
    return f"the last {rows} entries cut off"


_TAMPERINGS: Final[dict[str, Callable[[Ledger, random.Random], str]]] = {
    "changed": _change,
    "removed": _remove,
    "swapped": _swap,
    "cut": _cut,
}


def measure(context: Context, whole: Ledger) -> Result:
    """Damages copies of a ledger in four ways and has each verified."""
    number = context.size(long=100, short=10)
    found = dict.fromkeys(_TAMPERINGS, 0)
    details: list[str] = []
    # A check that always complains would find everything.
    assert whole.verdict(whole.head).problems == ()
    with context.track("ledgers", number * len(found)) as step:
        for kind, tamper in _TAMPERINGS.items():
            for seed in range(number):
                with whole.copied() as copy:
                    done = tamper(copy, random.Random(f"{kind} {seed}"))
                    if kind == "cut":
                        # Nothing in what is left can show it: that is what the kept head is for.
                        assert copy.verdict(None).problems == ()
                    problems = copy.verdict(whole.head if kind == "cut" else None).problems
                found[kind] += bool(problems)
                if not problems:
                    details.append(f"not found, seed {seed}: {done}")
                step()
    measured = ", ".join(f"{count} {kind}" for kind, count in found.items())
    return Result(number * len(found), f"found: {measured}", f"{number} each", not details, details)


def on_sqlite(context: Context) -> Result:
    """On SQLite, where the bytes of the file are changed, too."""
    with tempfile.TemporaryDirectory() as name:
        return measure(context, SqliteLedger.made(Path(name)))


def on_postgres(context: Context) -> Result:
    """On PostgreSQL, by SQL."""
    with postgres.server() as server:
        return measure(context, PostgresLedger.made(server))
