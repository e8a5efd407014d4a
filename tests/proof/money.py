"""What is promised of money: a ledger that shows when it was tampered with."""

from __future__ import annotations

import asyncio
import contextlib
import random
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from services.metering.accounts import Limits, Payer, Tenant
from services.metering.adapters import sqlite_files
from services.metering.adapters.sqlite import FILE_NAME as _FILE
from services.metering.adapters.sqlite import open_store
from services.metering.ledger import Entry, Head
from tests.conformance.ledger.examples import NOW, key, settlement
from tests.proof.registry import Context, Result, Scenario

_ROWS: Final = 300
_KEYS: Final = 4
_LONGEST_ROW: Final = 1000

Tamper = Callable[[Path, random.Random], str]
"""Changes the closed ledger in a directory, past its guards, and says how."""


async def _fill(directory: Path, seed: int) -> Head:
    """A ledger with entries of several keys."""
    rng = random.Random(seed)
    payers = [Payer("acme", "default", f"key-{number}") for number in range(_KEYS)]
    async with open_store(directory) as store:
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


@contextlib.contextmanager
def _unguarded(directory: Path) -> Iterator[sqlite3.Connection]:
    """The ledger's file with its triggers off; whoever can write to the file can do that."""
    with contextlib.closing(sqlite3.connect(directory / _FILE)) as connection:
        triggers = connection.execute("SELECT name, sql FROM sqlite_schema WHERE type = 'trigger'").fetchall()
        for name, _ in triggers:
            connection.execute(f"DROP TRIGGER {name}")
        yield connection
        for _, statement in triggers:
            connection.execute(statement)
        connection.commit()


def _balance(connection: sqlite3.Connection) -> None:
    """Puts the accounts right again, as who takes money away would."""
    for column, prefix in (
        ("key_id", "'key/' || "),
        ("project_id", "'project/' || tenant_id || '/' || "),
        ("tenant_id", "'tenant/' || "),
    ):
        connection.execute(
            f"UPDATE accounts SET spent = (SELECT COALESCE(SUM(amount), 0) FROM journal WHERE {prefix}{column} = accounts.name) "
            f"WHERE name LIKE {prefix.partition(' ||')[0]} || '%'"
        )


def _change_value(directory: Path, rng: random.Random) -> str:
    """A byte of a value, by SQL."""
    column = rng.choice([*Entry._fields, "hash"])
    sequence = rng.randrange(1, _ROWS + 1)
    with _unguarded(directory) as connection:
        (old,) = connection.execute(f"SELECT {column} FROM journal WHERE sequence = ?", (sequence,)).fetchone()
        new: str | int | bytes
        if isinstance(old, int):
            new = old ^ (1 << rng.randrange(8))
        else:
            data = bytearray(old.encode() if isinstance(old, str) else old) or bytearray(b"\0")
            # Text stays text: of its bits the lower ones.
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(5 if isinstance(old, str) else 8)
            new = data.decode() if isinstance(old, str) else bytes(data)
        connection.execute(f"UPDATE journal SET {column} = ? WHERE sequence = ?", (new, sequence))
        _balance(connection)
    return f"{column} of entry {sequence}: {old!r} -> {new!r}"


def _change_byte(directory: Path, rng: random.Random) -> str:
    """A byte of a row as it lies in the file, the row's own head included."""
    path = directory / _FILE
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        sequence = rng.randrange(1, _ROWS + 1)
        attempt, hashed = connection.execute("SELECT attempt_id, hash FROM journal WHERE sequence = ?", (sequence,)).fetchone()
    data = bytearray(path.read_bytes())
    end = data.index(hashed) + len(hashed)
    # Before the first value stand the row's length, its number, and a byte or more on the kind of each value.
    start = data.rindex(attempt.encode(), max(0, end - _LONGEST_ROW), end) - len(Entry._fields) - 2
    place = rng.randrange(start, end)
    old = data[place]
    data[place] ^= rng.randrange(1, 256)
    path.write_bytes(data)
    return f"byte {place - start} of {end - start} of entry {sequence}: {old:#04x} -> {data[place]:#04x}"


def _change(directory: Path, rng: random.Random) -> str:
    return rng.choice([_change_value, _change_byte])(directory, rng)


def _remove(directory: Path, rng: random.Random) -> str:
    sequence = rng.randrange(1, _ROWS)
    with _unguarded(directory) as connection:
        connection.execute("DELETE FROM journal WHERE sequence = ?", (sequence,))
        closed = rng.random() < 0.5
        if closed:
            # Who takes a row away may close the gap.
            connection.execute("UPDATE journal SET sequence = -sequence WHERE sequence > ?", (sequence,))
            connection.execute("UPDATE journal SET sequence = -sequence - 1 WHERE sequence < 0")
        _balance(connection)
    return f"entry {sequence} removed" + " and the others renumbered" * closed


def _swap(directory: Path, rng: random.Random) -> str:
    first, second = rng.sample(range(1, _ROWS + 1), 2)
    with _unguarded(directory) as connection:
        for old, new in ((first, -1), (second, first), (-1, second)):
            connection.execute("UPDATE journal SET sequence = ? WHERE sequence = ?", (new, old))
    return f"entries {first} and {second} swapped"


def _cut(directory: Path, rng: random.Random) -> str:
    rows = rng.randrange(1, _ROWS)
    with _unguarded(directory) as connection:
        connection.execute("DELETE FROM journal WHERE sequence > ?", (_ROWS - rows,))
        _balance(connection)
    return f"the last {rows} entries cut off"


_TAMPERINGS: Final[dict[str, Tamper]] = {"changed": _change, "removed": _remove, "swapped": _swap, "cut": _cut}


def ledger_tampering(context: Context) -> Result:
    """Damages copies of a ledger in four ways and has each verified."""
    number = context.size(long=100, short=10)
    found = dict.fromkeys(_TAMPERINGS, 0)
    details: list[str] = []
    with tempfile.TemporaryDirectory() as name, context.track("ledgers", number * len(found)) as step:
        whole = Path(name) / "whole"
        head = asyncio.run(_fill(whole, 1))
        # A check that always complains would find everything.
        assert sqlite_files.verify_file(whole / _FILE, head).problems == ()
        for kind, tamper in _TAMPERINGS.items():
            for seed in range(number):
                copy = Path(shutil.copytree(whole, Path(name) / "copy"))
                done = tamper(copy, random.Random(f"{kind} {seed}"))
                if kind == "cut":
                    # Nothing in what is left can show it: that is what the kept head is for.
                    assert sqlite_files.verify_file(copy / _FILE).problems == ()
                verdict = sqlite_files.verify_file(copy / _FILE, head if kind == "cut" else None)
                found[kind] += bool(verdict.problems)
                if not verdict.problems:
                    details.append(f"not found, seed {seed}: {done}")
                shutil.rmtree(copy)
                step()
    measured = ", ".join(f"{count} {kind}" for kind, count in found.items())
    return Result(number * len(found), f"found: {measured}", f"{number} each", not details, details)


SCENARIOS: Final = (
    Scenario(
        "money.ledger_tampering",
        "`ledger verify` finds a changed byte, a removed row, swapped rows, and against a kept head a cut tail",
        ledger_tampering,
    ),
)
