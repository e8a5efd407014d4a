"""Ledgers on SQLite as files: the check of one that no process uses, backup while one does, restore.

Nothing here goes through the running metering service: it works where the file is, and also when that service doesn't start.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from services.metering.adapters.sqlite import FILE_NAME, SCHEMA_VERSION, file_lock, verify_connection
from services.metering.errors import LedgerFileError
from services.metering.ledger import Head, Verdict

_PAGES: Final = 4096
"""Copied at a time: 16 MiB."""
_SIDES: Final = ("", "-wal", "-shm")

Progress = Callable[[int, int], None]
"""Told pages done and pages in all."""


def verify_file(path: Path, expected: Head | None = None) -> Verdict:
    """Checks a ledger's file, in use or not. Raises LedgerFileError when it isn't one."""
    with _reading(path) as connection:
        return verify_connection(connection, expected)


def backup(source: Path, target: Path, progress: Progress) -> Verdict:
    """Copies the ledger as it is at this moment while others write to it, then checks the copy; a wrong one stays away.

    Returns the verdict on the copy. Raises LedgerFileError when there is no ledger, when `target` is there already, when the disk
    doesn't take it, and when the copy is wrong.
    """
    if target.exists():
        raise LedgerFileError(target, "is there already: a backup replaces nothing")
    part = target.with_name(f".{target.name}.part")
    try:
        with _reading(source) as connection:
            # What was committed by now, however long the copy takes; writers go on meanwhile.
            connection.execute("BEGIN")
            connection.execute("SELECT COUNT(*) FROM sqlite_schema").fetchone()
            part.unlink(missing_ok=True)
            with contextlib.closing(sqlite3.connect(part)) as copy:
                connection.backup(copy, pages=_PAGES, progress=lambda _, left, total: progress(total - left, total))
                # One file, without a log beside it.
                copy.execute("PRAGMA journal_mode=DELETE")
        verdict = verify_file(part)
        if verdict.problems:
            raise LedgerFileError(source, f"has problems, and so has its copy: {verdict.problems[0]}")
        _sync(part)
        # Unlike a rename it fails when somebody made the target meanwhile.
        os.link(part, target)
        _sync(target.parent)
    except (OSError, sqlite3.Error) as error:
        raise LedgerFileError(target, f"could not be written: {error}") from error
    finally:
        part.unlink(missing_ok=True)
    return verdict


def restore(source: Path, directory: Path, progress: Progress) -> tuple[Verdict, Path | None]:
    """Puts a backup in the place of the ledger in `directory`, whose files are kept under another name.

    Returns the verdict on what is in place now and the kept file, None where there was no ledger. Raises LedgerFileError when the
    backup is wrong, or when metering runs.
    """
    verdict = verify_file(source)
    if verdict.problems:
        raise LedgerFileError(source, f"is not restored, it has problems: {verdict.problems[0]}")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with file_lock(directory):
            target = directory / FILE_NAME
            part = directory / f".{FILE_NAME}.part"
            part.unlink(missing_ok=True)
            with _reading(source) as connection, contextlib.closing(sqlite3.connect(part)) as copy:
                connection.backup(copy, pages=_PAGES, progress=lambda _, left, total: progress(total - left, total))
                copy.execute("PRAGMA journal_mode=DELETE")
            _sync(part)
            kept = _set_aside(directory) if target.exists() else None
            os.replace(part, target)
            _sync(directory)
    except (OSError, sqlite3.Error) as error:
        raise LedgerFileError(directory, f"could not be restored: {error}") from error
    except RuntimeError as error:
        raise LedgerFileError(directory, f"is in use: {error}") from error
    return verdict, kept


def _set_aside(directory: Path) -> Path:
    """Renames the ledger with its log."""
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    kept = directory / f"{FILE_NAME}.before-restore-{stamp}"
    number = 1
    while kept.exists():
        number += 1
        kept = directory / f"{FILE_NAME}.before-restore-{stamp}-{number}"
    # The log first: a crash in between leaves a ledger without its last commits beside the name of the backup, never the backup
    # with another ledger's log.
    for side in reversed(_SIDES):
        old = directory / f"{FILE_NAME}{side}"
        if old.exists():
            os.replace(old, kept.with_name(kept.name + side))
    return kept


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[sqlite3.Connection]:
    """The ledger's file, read only, whether somebody uses it or not."""
    if not path.is_file():
        raise LedgerFileError(path, "is not there")
    # Without a log beside it nobody writes to it, and it may lie where nothing can be written.
    rest = "mode=ro" if path.with_name(path.name + "-wal").exists() else "mode=ro&immutable=1"
    try:
        connection = sqlite3.connect(f"{path.resolve().as_uri()}?{rest}", uri=True, isolation_level=None, timeout=5.0)
    except sqlite3.Error as error:
        raise LedgerFileError(path, f"can't be read: {error}") from error
    with contextlib.closing(connection):
        try:
            (version,) = connection.execute("PRAGMA user_version").fetchone()
        except sqlite3.Error as error:
            raise LedgerFileError(path, f"is no ledger: {error}") from error
        if version != SCHEMA_VERSION:
            raise LedgerFileError(path, f"is no ledger of schema version {SCHEMA_VERSION}: it says {version}")
        yield connection


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
