"""The spool: what attempts cost, written before anybody could forget it, posted to the ledger exactly once.

An attempt's start is written before the provider is called, its settlement before the last byte goes to the caller, each by one
`write` without fsync: `kill -9` loses nothing, a power cut at most the settlements of the last group. They are fsynced in groups, whether
the ledger is there or not, and then posted. Files are replayed at the next start: settlements are posted again, which the ledger takes
once by attempt id, and attempts that never settled are posted as lost, to the platform's account.

    record = length (u32 LE), CRC-32 of the payload (u32 LE), kind (u8), payload
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import struct
import zlib
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Final, Protocol

from services.execution.errors import SpoolFull
from services.runtime.errors import Failure

_HEADER: Final = struct.Struct("<IIB")
_START: Final = 1
_SETTLE: Final = 2
_LARGEST: Final = 1024 * 1024
_MOST_PER_POST: Final = 500
_FIRST_PAUSE: Final = 0.05
_LONGEST_PAUSE: Final = 5.0


class Record(Protocol):
    """What is spooled: a settlement message."""

    attempt_id: str

    def SerializeToString(self) -> bytes:
        """Its bytes."""


Post = Callable[[Sequence[Any]], Awaitable[None]]
"""Posts settlements to the ledger; raises Failure when it can't at the moment."""


class Begun:
    """The start of an attempt. Called right before the first byte of the attempt leaves, it sees to it that the record is written."""

    __slots__ = ("_spool", "failure", "passed")

    def __init__(self, spool: Spool) -> None:
        self._spool = spool
        self.failure: SpoolFull | None = None
        """The record could not be written."""
        self.passed = False
        """The attempt may have sent something."""

    def __call__(self) -> None:
        """Raises SpoolFull: then nothing may be sent."""
        self._spool.write()
        if self.failure is not None:
            raise self.failure
        self.passed = True


class _Segment:
    """One file. `waiting` counts what in it isn't done with: open attempts and unposted settlements."""

    __slots__ = ("descriptor", "path", "size", "waiting")

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self.descriptor = descriptor
        self.size = 0
        self.waiting = 0


class Spool:
    """The spool of one process, in a directory of its own. Use `open`."""

    def __init__(self, directory: Path, post: Post, *, group_seconds: float, segment_bytes: int, most_bytes: int) -> None:
        self._directory = directory
        self._post = post
        self._group = group_seconds
        # Only whole segments are freed: one that is never full would hold the spool at its limit for ever.
        self._segment_bytes = min(segment_bytes, most_bytes // 4)
        self._most_bytes = most_bytes
        self._segments: list[_Segment] = []
        self._number = 0
        self._bytes = 0
        self._open: dict[str, _Segment] = {}
        self._fresh: list[tuple[Any, _Segment]] = []
        """Settled and not fsynced yet."""
        self._syncing = 0
        """How many are being fsynced."""
        self._unposted: deque[tuple[Any, _Segment]] = deque()
        self._waiting: list[tuple[bytes, Record, Begun | None]] = []
        """To be written before anything is sent, and at the end of this turn of the loop at the latest."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._settled = asyncio.Event()
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._lock: BinaryIO | None = None
        self.posted_count = 0
        self.failure_count = 0

    @property
    def backlog(self) -> int:
        """Settlements that are not posted yet."""
        return len(self._fresh) + self._syncing + len(self._unposted)

    def open(self, parse: Callable[[bytes], Any], lost: Callable[[Any], Any]) -> int:
        """Locks the directory, reads what an earlier process left, and returns how many attempts it lost.

        `parse` makes a record of a payload, `lost` the settlement of an attempt that only began.
        """
        self._directory.mkdir(parents=True, exist_ok=True)
        self._lock = (self._directory / "lock").open("wb")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RuntimeError(f"another execution process uses {self._directory}; give each its own mesh.state_dir") from None
        left = sorted(self._directory.glob("*.spool"))
        lost_count = 0
        for path in left:
            self._number = max(self._number, int(path.stem))
        began: dict[str, tuple[Any, _Segment]] = {}
        for path in left:
            segment = _Segment(path, -1)
            segment.size = path.stat().st_size
            self._bytes += segment.size
            self._segments.append(segment)
            for kind, payload in _records(path):
                record = parse(payload)
                if kind == _START:
                    began[record.attempt_id] = (record, segment)
                    segment.waiting += 1
                else:
                    started = began.pop(record.attempt_id, None)
                    if started is not None:
                        started[1].waiting -= 1
                    self._queue(record, segment)
            # Whoever wrote it may have been killed before its fsync, and the ledger may be away for long.
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        for record, segment in began.values():
            lost_count += 1
            segment.waiting -= 1
            self._queue(lost(record), segment)
        for segment in list(self._segments):
            self._drop_if_done(segment)
        self._next_segment()
        return lost_count

    def _queue(self, record: Any, segment: _Segment) -> None:
        segment.waiting += 1
        self._unposted.append((record, segment))
        self._idle.clear()
        self._wake.set()

    def _next_segment(self) -> _Segment:
        self._number += 1
        path = self._directory / f"{self._number:010d}.spool"
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_EXCL, 0o600)
        segment = _Segment(path, descriptor)
        before = self._segments[-1] if self._segments else None
        self._segments.append(segment)
        if before is not None:
            self._drop_if_done(before)
        return segment

    def _append(self, data: bytes) -> _Segment:
        """Raises OSError or SpoolFull."""
        segment = self._segments[-1]
        if segment.descriptor < 0:
            raise SpoolFull
        if segment.size >= self._segment_bytes:
            segment = self._next_segment()
        written = os.write(segment.descriptor, data)
        if written != len(data):
            # A full disk. What was written of it goes again: a reader would stop there and miss what is written later.
            os.ftruncate(segment.descriptor, segment.size)
            raise SpoolFull
        segment.size += written
        self._bytes += written
        return segment

    def settle(self, record: Record) -> None:
        """Records how an attempt ended. Never refuses: money that was spent is kept at least in memory and posted from there."""
        # In order: a start behind its settlement would be taken for an attempt that never ended.
        self.write()
        try:
            segment = self._append(_framed(_SETTLE, record))
        except (OSError, SpoolFull):
            self.failure_count += 1
            segment = self._segment_of(record)
        self._take_settled(record, segment)

    def _segment_of(self, record: Record) -> _Segment:
        """Where a settlement that can't be written is counted: its start stays on disk until it is posted."""
        return self._open.get(record.attempt_id, self._segments[-1])

    def _take_settled(self, record: Record, segment: _Segment) -> None:
        segment.waiting += 1
        self._fresh.append((record, segment))
        started = self._open.pop(record.attempt_id, None)
        if started is not None:
            started.waiting -= 1
            if started is not segment:
                self._drop_if_done(started)
        if not self._settled.is_set():
            self._idle.clear()
            self._settled.set()

    def begin(self, record: Record) -> Begun:
        """Records that an attempt begins, by one `write` for all of the same turn of the loop. What it returns is to be called before
        anything of the attempt leaves the process.

        Raises SpoolFull: then it must not begin.
        """
        if self._bytes > self._most_bytes:
            raise SpoolFull
        begun = Begun(self)
        self._soon(_framed(_START, record), record, begun)
        return begun

    def end(self, record: Record) -> None:
        """As `settle`, but by one `write` for all of the same turn of the loop. It is done before anything that passes the process's
        barrier leaves it."""
        try:
            frame = _framed(_SETTLE, record)
        except SpoolFull:
            self.settle(record)
        else:
            self._soon(frame, record, None)

    def _soon(self, frame: bytes, record: Record, begun: Begun | None) -> None:
        group = self._waiting
        if not group:
            loop = self._loop
            if loop is None:
                # Kept: asking which one is running costs a system call.
                loop = self._loop = asyncio.get_running_loop()
            loop.call_soon(self.write)
        group.append((frame, record, begun))

    def write(self) -> None:
        """Writes what waits. Never raises: what can't be written is told to who began it, and what ended is kept in memory."""
        group = self._waiting
        if not group:
            return
        self._waiting = []
        failure: SpoolFull | None = None
        try:
            segment = self._append(b"".join([frame for frame, _, _ in group]))
        except (OSError, SpoolFull) as error:
            failure = error if isinstance(error, SpoolFull) else SpoolFull()
            segment = self._segments[-1]
            self.failure_count += 1
        for _, record, begun in group:
            if begun is None:
                self._take_settled(record, segment if failure is None else self._segment_of(record))
            elif failure is None:
                segment.waiting += 1
                self._open[record.attempt_id] = segment
            else:
                begun.failure = failure

    async def run(self) -> None:
        """Fsyncs and posts, in groups, until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._sync_forever())
            group.create_task(self._post_forever())

    async def _sync_forever(self) -> None:
        # On its own: a ledger that is away or slow must keep nothing from the disk.
        while True:
            if not self._fresh:
                self._settled.clear()
                await self._settled.wait()
            # What comes within the group's time shares the fsync and the call.
            await asyncio.sleep(self._group)
            group, self._fresh = self._fresh, []
            self._syncing = len(group)
            try:
                descriptors = {segment.descriptor for _, segment in group}
                await asyncio.get_running_loop().run_in_executor(None, self._sync, descriptors)
            except BaseException:
                self._fresh[:0] = group
                raise
            else:
                self._unposted.extend(group)
                self._wake.set()
            finally:
                self._syncing = 0

    async def _post_forever(self) -> None:
        pause = _FIRST_PAUSE
        while True:
            if not self._unposted:
                self._wake.clear()
                if not self.backlog:
                    self._idle.set()
                await self._wake.wait()
            try:
                await self._post_some()
                pause = _FIRST_PAUSE
            except Failure:
                self.failure_count += 1
                await asyncio.sleep(pause)
                pause = min(pause * 2, _LONGEST_PAUSE)

    async def _post_some(self) -> None:
        count = min(len(self._unposted), _MOST_PER_POST)
        group = [self._unposted[index] for index in range(count)]
        await self._post([record for record, _ in group])
        self.posted_count += count
        for _, segment in group:
            self._unposted.popleft()
            segment.waiting -= 1
        for segment in dict.fromkeys(segment for _, segment in group):
            self._drop_if_done(segment)

    @staticmethod
    def _sync(descriptors: set[int]) -> None:
        for descriptor in descriptors:
            if descriptor >= 0:
                os.fdatasync(descriptor)

    def _drop_if_done(self, segment: _Segment) -> None:
        if segment.waiting or segment is self._segments[-1]:
            return
        self._segments.remove(segment)
        self._bytes -= segment.size
        try:
            if segment.descriptor >= 0:
                os.close(segment.descriptor)
            segment.path.unlink(missing_ok=True)
        except OSError:
            # The next start reads it again; the ledger takes no settlement twice.
            self.failure_count += 1

    async def flush(self, seconds: float) -> bool:
        """Waits until everything is posted; False when that took longer than `seconds`. `run` must be running."""
        self.write()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self.backlog:
                    await self._idle.wait()
        return not self.backlog

    def close(self) -> None:
        """Closes the files; those that are done with are removed, the others wait for the next start. Nothing is written from then on."""
        self.write()
        for segment in self._segments:
            if segment.descriptor >= 0:
                if segment.waiting:
                    os.fsync(segment.descriptor)
                os.close(segment.descriptor)
                segment.descriptor = -1
        if self._segments and not self._segments[-1].waiting:
            self._segments[-1].path.unlink(missing_ok=True)
        if self._lock is not None:
            self._lock.close()


def _framed(kind: int, record: Record) -> bytes:
    """Raises SpoolFull when it is larger than a reader takes."""
    payload = record.SerializeToString()
    if len(payload) > _LARGEST:
        raise SpoolFull
    return _HEADER.pack(len(payload), zlib.crc32(payload), kind) + payload


def _records(path: Path) -> Iterator[tuple[int, bytes]]:
    """The whole records of a file; ends at a torn tail."""
    with path.open("rb") as file:
        while len(header := file.read(_HEADER.size)) == _HEADER.size:
            length, checksum, kind = _HEADER.unpack(header)
            if length > _LARGEST or kind not in (_START, _SETTLE):
                return
            payload = file.read(length)
            if len(payload) != length or zlib.crc32(payload) != checksum:
                return
            yield kind, payload
