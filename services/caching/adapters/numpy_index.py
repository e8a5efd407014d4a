"""The embedded vector index: exact search by numpy in memory, with an SQLite file behind it.

Entries of one scope are few, so comparing all of them is faster than a graph and misses none. The file is written by one thread behind
the path and read at start; what a crash loses of it costs hit rate only. Deletions are in the file before they are confirmed.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from services.caching.errors import TierUnavailable
from services.caching.ports import Match, Record, Vector

DIMENSIONS: Final = 384
_OVERHEAD: Final = 2048 + 3 * DIMENSIONS * 4
"""Bytes that an entry costs beside its text and payload: its vector, its row, and as much for rows that are free."""
_INLINE_ROWS: Final = 1000
"""Larger scopes are searched in a thread: 1,000 rows take about 0.2 ms."""
_MAX_UNWRITTEN: Final = 1000
_WRITE_EVERY: Final = 0.2

_SCHEMA: Final = """
create table if not exists entries (
  partition text not null, key blob not null, scope blob not null, namespace text not null, vector blob not null,
  question text not null, payload blob not null, create_time real not null, expire_time real not null,
  primary key (partition, key)
) without rowid
"""
_WRITE: Final = "insert or replace into entries values (?, ?, ?, ?, ?, ?, ?, ?, ?)"
_REMOVE: Final = "delete from entries where partition = ? and key = ?"
_REMOVE_PARTITION: Final = "delete from entries where partition = ?"
_REMOVE_NAMESPACE: Final = "delete from entries where partition = ? and namespace = ?"


@dataclass(frozen=True, slots=True)
class Limits:
    """How much an index holds."""

    entries_per_partition: int
    entries: int
    bytes: int


class _Shelf:
    """The records of one scope: rows of a matrix that doubles when it is full."""

    __slots__ = ("is_read", "matrix", "records", "rows")

    def __init__(self) -> None:
        self.matrix = np.empty((1, DIMENSIONS), dtype=np.float32)
        self.records: list[Record] = []
        self.rows: dict[bytes, int] = {}
        self.is_read = False
        """Whether a thread may be reading the matrix, so that its rows must not change any more."""

    def add(self, record: Record) -> None:
        row = len(self.records)
        if row == len(self.matrix):
            larger = np.empty((row * 2, DIMENSIONS), dtype=np.float32)
            larger[:row] = self.matrix
            self.matrix = larger
            self.is_read = False
        self.matrix[row] = record.vector
        self.records.append(record)
        self.rows[record.key] = row

    def remove(self, key: bytes) -> None:
        row = self.rows.pop(key)
        last = self.records.pop()
        if last.key != key:
            # The last row takes the free place.
            if self.is_read:
                self.matrix = self.matrix.copy()
                self.is_read = False
            self.matrix[row] = self.matrix[len(self.records)]
            self.records[row] = last
            self.rows[last.key] = row


class NumpyIndex:
    """See VectorIndex. Open it with `open_index`."""

    def __init__(self, limits: Limits, clock: Callable[[], float], executor: Executor, file: _File | None) -> None:
        self._limits = limits
        self._clock = clock
        self._executor = executor
        self._file = file
        self._shelves: dict[tuple[str, bytes], _Shelf] = {}
        self._partitions: dict[str, OrderedDict[bytes, Record]] = {}
        self._count = 0
        self._unwritten: list[tuple[str, tuple[Any, ...]]] = []
        self.bytes = 0
        """Memory of all entries."""
        self.dropped_writes = 0
        """Changes that didn't reach the file."""

    def __len__(self) -> int:
        return self._count

    async def upsert(self, record: Record) -> None:
        """See VectorIndex."""
        self._put(record)
        self._later(_WRITE, _row(record))

    async def search(self, partition: str, scope: bytes, vector: Vector, limit: int) -> list[Match]:
        """See VectorIndex."""
        shelf = self._shelves.get((partition, scope))
        if shelf is None or limit < 1:
            return []
        # The list may change while a thread computes; rows and records must belong together.
        records, matrix = shelf.records, shelf.matrix[: len(shelf.records)]
        if len(records) <= _INLINE_ROWS:
            scores = matrix @ vector
        else:
            records = records.copy()
            shelf.is_read = True
            scores = await asyncio.get_running_loop().run_in_executor(self._executor, np.matmul, matrix, vector)
        now = self._clock()
        matches: list[Match] = []
        for row in np.argsort(-scores):
            record = records[int(row)]
            if record.expire_time > now:
                score = min(1.0, max(-1.0, float(scores[row])))
                matches.append(Match(score, record.key, record.text, record.payload, record.create_time))
                if len(matches) == limit:
                    break
        return matches

    async def delete(self, partition: str, namespace: str = "") -> int:
        """See VectorIndex."""
        removed = self._of(partition, namespace)
        for record in removed:
            self._remove(partition, record.key)
        if namespace:
            self._later(_REMOVE_NAMESPACE, (partition, namespace))
        else:
            self._later(_REMOVE_PARTITION, (partition,))
        await self.write()
        return len(removed)

    async def count(self, partition: str, namespace: str = "") -> int:
        """See VectorIndex."""
        return len(self._of(partition, namespace))

    async def ping(self) -> None:
        """See VectorIndex."""

    def sweep(self) -> int:
        """Removes entries whose time is over; returns how many."""
        now = self._clock()
        gone = [
            (partition, key)
            for partition, records in self._partitions.items()
            for key, record in records.items()
            if record.expire_time <= now
        ]
        for partition, key in gone:
            self._drop(partition, key)
        return len(gone)

    async def load(self) -> None:
        """Fills the memory from the file."""
        if self._file is None:
            return
        loop = asyncio.get_running_loop()
        for row in await loop.run_in_executor(self._file.executor, self._file.load, self._clock(), self._limits.entries):
            self._put(_record(row))

    async def run(self) -> None:
        """The worker that writes the file."""
        while True:
            await asyncio.sleep(_WRITE_EVERY)
            with contextlib.suppress(TierUnavailable):
                await self.write()

    async def write(self) -> None:
        """Writes what is waiting. Raises TierUnavailable when the file can't be written; then it is dropped and counted."""
        changes, self._unwritten = self._unwritten, []
        if not changes or self._file is None:
            return
        try:
            await asyncio.get_running_loop().run_in_executor(self._file.executor, self._file.apply, changes)
        except sqlite3.Error as error:
            self.dropped_writes += len(changes)
            raise TierUnavailable(f"the index's file can't be written: {type(error).__name__}") from None

    def _put(self, record: Record) -> None:
        if record.vector.shape != (DIMENSIONS,):
            raise ValueError(f"vectors have {DIMENSIONS} numbers, got {record.vector.shape!r}")
        size = _size(record)
        if size > self._limits.bytes:
            return
        records = self._partitions.get(record.partition)
        if records is not None and record.key in records:
            self._remove(record.partition, record.key)
        records = self._partitions.setdefault(record.partition, OrderedDict())
        records[record.key] = record
        self._shelves.setdefault((record.partition, record.scope), _Shelf()).add(record)
        self._count += 1
        self.bytes += size
        if len(records) > self._limits.entries_per_partition:
            self._drop(record.partition, next(iter(records)))
        while self._count > self._limits.entries or self.bytes > self._limits.bytes:
            # The largest tenant makes room, so that nobody can push out all others.
            largest = max(self._partitions, key=lambda name: len(self._partitions[name]))
            self._drop(largest, next(iter(self._partitions[largest])))

    def _drop(self, partition: str, key: bytes) -> None:
        self._remove(partition, key)
        self._later(_REMOVE, (partition, key))

    def _remove(self, partition: str, key: bytes) -> None:
        records = self._partitions[partition]
        record = records.pop(key)
        if not records:
            del self._partitions[partition]
        shelf = self._shelves[partition, record.scope]
        shelf.remove(key)
        if not shelf.records:
            del self._shelves[partition, record.scope]
        self._count -= 1
        self.bytes -= _size(record)

    def _of(self, partition: str, namespace: str) -> Sequence[Record]:
        records = self._partitions.get(partition)
        return [] if records is None else [record for record in records.values() if namespace in ("", record.namespace)]

    def _later(self, statement: str, values: tuple[Any, ...]) -> None:
        if self._file is None:
            return
        if len(self._unwritten) >= _MAX_UNWRITTEN and statement == _WRITE:
            self.dropped_writes += 1
            return
        self._unwritten.append((statement, values))


class _File:
    """The SQLite file, for one thread."""

    def __init__(self, executor: Executor, path: Path) -> None:
        self.executor = executor
        self._connection = sqlite3.connect(path, check_same_thread=False, timeout=5, isolation_level=None)
        self._connection.execute("pragma journal_mode = wal")
        # A cache may lose its last entries with the power, not its file.
        self._connection.execute("pragma synchronous = normal")
        self._connection.execute(_SCHEMA)

    def load(self, now: float, limit: int) -> list[tuple[Any, ...]]:
        self._connection.execute("delete from entries where expire_time <= ?", (now,))
        query = "select * from (select * from entries order by create_time desc limit ?) order by create_time"
        return self._connection.execute(query, (limit,)).fetchall()

    def apply(self, changes: Sequence[tuple[str, tuple[Any, ...]]]) -> None:
        connection = self._connection
        connection.execute("begin immediate")
        try:
            for statement, values in changes:
                connection.execute(statement, values)
            connection.execute("commit")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                connection.execute("rollback")
            raise

    def close(self) -> None:
        self._connection.close()


def _open_file(executor: Executor, path: Path) -> _File:
    try:
        return _File(executor, path)
    except sqlite3.DatabaseError:
        # A file that isn't a database, or a broken one: a cache starts anew rather than not at all.
        for name in (path, path.with_name(path.name + "-wal"), path.with_name(path.name + "-shm")):
            name.unlink(missing_ok=True)
        return _File(executor, path)


@contextlib.asynccontextmanager
async def open_index(limits: Limits, clock: Callable[[], float], path: Path | None) -> AsyncIterator[NumpyIndex]:
    """An index with what the file at `path` has; None: in memory only. `clock` is Unix time in seconds.

    Raises TierUnavailable when the file can't be opened.
    """
    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(1, thread_name_prefix="index-file") as writer, ThreadPoolExecutor(1, "index-search") as searcher:
        file = None
        try:
            if path is not None:
                file = await loop.run_in_executor(writer, _open_file, writer, path)
            index = NumpyIndex(limits, clock, searcher, file)
            await index.load()
        except sqlite3.Error as error:
            raise TierUnavailable(f"the index's file can't be opened: {type(error).__name__}") from None
        try:
            yield index
        finally:
            with contextlib.suppress(TierUnavailable):
                await index.write()
            if file is not None:
                await loop.run_in_executor(writer, file.close)


def _size(record: Record) -> int:
    return _OVERHEAD + len(record.text) + len(record.payload)


def _row(record: Record) -> tuple[Any, ...]:
    return (
        record.partition,
        record.key,
        record.scope,
        record.namespace,
        record.vector.tobytes(),
        record.text,
        record.payload,
        record.create_time,
        record.expire_time,
    )


def _record(row: tuple[Any, ...]) -> Record:
    partition, key, scope, namespace, vector, text, payload, create_time, expire_time = row
    return Record(partition, scope, key, namespace, np.frombuffer(vector, np.float32), text, payload, create_time, expire_time)
