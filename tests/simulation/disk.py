"""Files in memory, as a spool uses them: writes may fail, and a process may die in the middle of one.

What was written stays when a process dies, as it does after `kill -9`. When its machine loses power, only what was synced stays for sure:
of the rest some, from its begin on.
"""

from __future__ import annotations

import contextlib
import fcntl as real_fcntl
import io
import os as real_os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from services.execution import spool
from sluice.metering.v1 import metering_service_pb2
from tests.simulation.universe import Loop, Universe

_HEADER = struct.Struct("<IIB")
START, SETTLE = 1, 2

OnRecord = Callable[[int, metering_service_pb2.Settlement], None]


@dataclass(slots=True)
class _Open:
    path: str
    loop: Loop


@dataclass(slots=True)
class Disk:
    """All files, whoever they belong to. It is told each record that is whole on it."""

    universe: Universe
    on_record: OnRecord
    fails: float = 0.0
    """Probability that a write finds the disk full."""
    files: dict[str, bytearray] = field(default_factory=dict)
    locks: dict[str, Loop] = field(default_factory=dict)
    lost: dict[str, float] = field(default_factory=dict)
    """Attempts of which a record went with the power, and how long before it had been written, seconds."""
    _synced: dict[str, int] = field(default_factory=dict)
    _records: dict[str, list[tuple[int, int, str, float]]] = field(default_factory=dict)
    """Of each file: where a record ends, its kind, its attempt, when it was written."""
    unwritten: set[str] = field(default_factory=set)
    """Attempts of which a record found the disk full: a start isn't sent then, a settlement is kept in memory alone."""
    _descriptors: dict[int, _Open] = field(default_factory=dict)
    _next: int = 100

    def open(self, path: str, loop: Loop, *, make: bool) -> int:
        """Makes a file, or opens one that is there; returns its descriptor."""
        loop.check()
        if make == (path in self.files):
            raise (FileExistsError if make else FileNotFoundError)(path)
        self.files.setdefault(path, bytearray())
        self._next += 1
        self._descriptors[self._next] = _Open(path, loop)
        return self._next

    def write(self, descriptor: int, data: bytes) -> int:
        """Appends; returns how much was written."""
        opened = self._descriptors[descriptor]
        loop = opened.loop
        loop.check()
        file = self.files[opened.path]
        self.universe.point(loop, "before a write")
        if self.universe.may(self.fails):
            self.universe.log(f"{loop.name} disk full")
            self.unwritten |= {record.attempt_id for _, record in _records(data)}
            part = int(self.universe.rng.random() * len(data))
            file += data[:part]
            return part
        if self.universe.may(0.5):
            # Only who is killed here leaves a part of it.
            part = int(self.universe.rng.random() * len(data))
            file += data[:part]
            self.universe.point(loop, "in a write")
            del file[len(file) - part :]
        self._note(opened.path, len(file), data)
        file += data
        self._tell(loop, data)
        self.universe.point(loop, "after a write")
        return len(data)

    def _note(self, path: str, at: int, data: bytes) -> None:
        for kind, record in _records(data):
            at += _HEADER.size + record.ByteSize()
            self._records.setdefault(path, []).append((at, kind, record.attempt_id, self.universe.now))

    def power_lost(self, folder: str, loop: Loop) -> None:
        """The machine under the process of this folder has lost power, and the process with it. Where it stood still, no time passed."""
        for path, file in self.files.items():
            if not path.startswith(f"{folder}/"):
                continue
            synced = self._synced.get(path, 0)
            cut = synced + int(self.universe.rng.random() * (len(file) - synced + 1))
            for end, kind, attempt, written in self._records.get(path, ()):
                if end > cut:
                    age = self.universe.now - max(written, min(loop.stalled_until, self.universe.now))
                    self.universe.log(f"{folder} lost {'start' if kind == START else 'settle'} {attempt}, {age:.6f} s old")
                    if kind == SETTLE:
                        self.lost[attempt] = age
                    else:
                        self.lost.setdefault(attempt, 0.0)
            del file[cut:]
            self._synced[path] = cut
            self._records[path] = [one for one in self._records.get(path, ()) if one[0] <= cut]

    def _tell(self, loop: Loop, data: bytes) -> None:
        for kind, record in _records(data):
            self.universe.log(f"{loop.name} disk {'start' if kind == START else 'settle'} {record.attempt_id}")
            self.on_record(kind, record)

    def truncate(self, descriptor: int, size: int) -> None:
        """Cuts a file."""
        opened = self._descriptors[descriptor]
        opened.loop.check()
        del self.files[opened.path][size:]

    def sync(self, descriptor: int) -> None:
        """What is in the file is there for good."""
        opened = self._descriptors[descriptor]
        opened.loop.check()
        self._synced[opened.path] = len(self.files[opened.path])

    def close(self, descriptor: int) -> None:
        """Closes a file."""
        self._descriptors[descriptor].loop.check()
        del self._descriptors[descriptor]

    def remove(self, path: str, loop: Loop) -> None:
        """Deletes a file, if there is one."""
        loop.check()
        self.universe.point(loop, "before a removal")
        if self.files.pop(path, None) is not None:
            self._synced.pop(path, None)
            self._records.pop(path, None)
            self.universe.log(f"{loop.name} disk removed {path}")
        self.universe.point(loop, "after a removal")

    def released(self, loop: Loop) -> None:
        """The process is gone, and with it what it had open and locked."""
        self._descriptors = {number: opened for number, opened in self._descriptors.items() if opened.loop is not loop}
        self.locks = {path: owner for path, owner in self.locks.items() if owner is not loop}


def _records(data: bytes) -> Iterator[tuple[int, metering_service_pb2.Settlement]]:
    at = 0
    while at < len(data):
        length, _, kind = _HEADER.unpack_from(data, at)
        at += _HEADER.size + length
        yield kind, metering_service_pb2.Settlement.FromString(data[at - length : at])


@dataclass(frozen=True, slots=True)
class Folder:
    """As much of a `Path` as a spool asks for, on behalf of one process."""

    disk: Disk
    path: str
    loop: Loop

    def __truediv__(self, name: str) -> Folder:
        return Folder(self.disk, f"{self.path}/{name}", self.loop)

    def __lt__(self, other: Folder) -> bool:
        return self.path < other.path

    @property
    def stem(self) -> str:
        """The name without its suffix."""
        return self.path.rpartition("/")[2].partition(".")[0]

    def mkdir(self, **_: Any) -> None:
        """Folders need no making."""

    def glob(self, pattern: str) -> list[Folder]:
        """Files of a suffix."""
        suffix = pattern.removeprefix("*")
        return [
            Folder(self.disk, path, self.loop)
            for path in self.disk.files
            if path.startswith(self.path) and path.endswith(suffix)
        ]

    def stat(self) -> Any:
        """Only its size."""
        return real_os.stat_result((0, 0, 0, 0, 0, 0, len(self.disk.files[self.path]), 0, 0, 0))

    def open(self, mode: str) -> Any:
        """To be read, or to be locked."""
        self.loop.check()
        return io.BytesIO(bytes(self.disk.files[self.path])) if mode == "rb" else _Lock(self)

    def unlink(self, *, missing_ok: bool) -> None:
        """Deletes it."""
        self.disk.remove(self.path, self.loop)


@dataclass(frozen=True, slots=True)
class _Lock:
    folder: Folder

    def take(self) -> None:
        """Raises OSError when another process has it."""
        locks = self.folder.disk.locks
        if locks.setdefault(self.folder.path, self.folder.loop) is not self.folder.loop:
            raise BlockingIOError(self.folder.path)

    def close(self) -> None:
        """Gives it back."""
        self.folder.disk.locks.pop(self.folder.path, None)


class _Os:
    """What a spool takes from `os`."""

    O_RDONLY, O_WRONLY, O_CREAT, O_APPEND, O_EXCL = 0, real_os.O_WRONLY, real_os.O_CREAT, real_os.O_APPEND, real_os.O_EXCL

    def __init__(self, disk: Disk) -> None:
        self.write = disk.write
        self.ftruncate = disk.truncate
        self.fdatasync = self.fsync = disk.sync
        self.close = disk.close
        self._disk = disk

    def open(self, path: Folder, flags: int, mode: int = 0) -> int:
        """Makes a file, or opens one to sync it."""
        return self._disk.open(path.path, path.loop, make=bool(flags & self.O_EXCL))


class _Fcntl:
    LOCK_EX, LOCK_NB = real_fcntl.LOCK_EX, real_fcntl.LOCK_NB

    @staticmethod
    def flock(lock: _Lock, flags: int) -> None:
        """Locks."""
        lock.take()


@contextlib.contextmanager
def mounted(disk: Disk) -> Iterator[None]:
    """While it is open, spools are on this disk."""
    with mock.patch.object(spool, "os", _Os(disk)), mock.patch.object(spool, "fcntl", _Fcntl):
        yield
