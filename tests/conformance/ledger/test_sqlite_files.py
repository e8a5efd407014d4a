from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import sqlite3
from pathlib import Path

import pytest

from services.metering.adapters import sqlite_files
from services.metering.adapters.sqlite import FILE_NAME, open_store
from services.metering.errors import LedgerFileError
from services.metering.ledger import Head
from services.metering.ports import Store
from tests.conformance.ledger.examples import settlement


def nothing(done: int, total: int) -> None:
    pass


async def filled(directory: Path, entries: int = 3) -> Head:
    async with open_store(directory) as store:
        await store.post([settlement(f"op-{number}/1", amount=number) for number in range(entries)])
        return await store.head()


def damage(path: Path) -> None:
    """Changes a row past the triggers."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.executescript(
            "DROP TRIGGER journal_is_append_only_update; UPDATE journal SET amount = 9 WHERE sequence = 1;"
        )


async def test_a_backup_taken_under_writes_is_the_ledger_as_it_was_at_one_moment(tmp_path: Path) -> None:
    async with open_store(tmp_path / "live") as store:
        await store.post([settlement(f"old-{number}/1", amount=1) for number in range(20_000)])
        stop = asyncio.Event()
        written = 0

        async def write() -> None:
            nonlocal written
            for number in itertools.count():
                if stop.is_set():
                    return
                await store.post([settlement(f"new-{number}/1", amount=1)])
                written += 1

        steps: list[int] = []
        writer = asyncio.create_task(write())
        verdict = await asyncio.to_thread(
            sqlite_files.backup, tmp_path / "live" / FILE_NAME, tmp_path / "b.db", lambda done, _: steps.append(done)
        )
        after = written
        stop.set()
        await writer
        # The copy took writes' time, and each of them may be in it or not, but not a part of one.
        assert after > 3
        assert verdict.problems == ()
        assert 20_000 <= verdict.entries <= 20_000 + after
        assert steps == sorted(steps)
        # What was in it then is in the ledger still.
        assert (await store.verify(verdict.head)).problems == ()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.db", "live"]


async def test_a_backup_replaces_nothing_and_leaves_nothing_half_done(tmp_path: Path) -> None:
    await filled(tmp_path / "live")
    source, target = tmp_path / "live" / FILE_NAME, tmp_path / "b.db"
    target.write_text("mine")
    with pytest.raises(LedgerFileError, match="there already"):
        sqlite_files.backup(source, target, nothing)
    assert target.read_text() == "mine"
    with pytest.raises(LedgerFileError, match=r"nowhere/b\.db could not be written"):
        sqlite_files.backup(source, tmp_path / "nowhere" / "b.db", nothing)
    with pytest.raises(LedgerFileError, match="is not there"):
        sqlite_files.backup(tmp_path / "none.db", tmp_path / "c.db", nothing)
    damage(source)
    with pytest.raises(LedgerFileError, match=r"has problems.*entry 1"):
        sqlite_files.backup(source, tmp_path / "c.db", nothing)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.db", "live"]


async def test_a_restored_backup_is_the_ledger_and_the_old_one_is_kept(tmp_path: Path) -> None:
    live = tmp_path / "live"
    head = await filled(live)
    sqlite_files.backup(live / FILE_NAME, tmp_path / "b.db", nothing)
    async with open_store(live) as store:
        await store.post([settlement("late/1", amount=50)])
        later = await store.head()
    verdict, kept = sqlite_files.restore(tmp_path / "b.db", live, nothing)
    assert verdict.head == head
    assert kept is not None
    assert sqlite_files.verify_file(kept, later).problems == ()
    async with open_store(live) as store:
        assert await store.head() == head
        # A head of later shows what the restored ledger lacks.
        assert (await store.verify(later)).problems == ("entries 4 to 4 are missing: they were there when the head was kept",)
        await store.post([settlement("again/1", amount=1)])
    # Twice in a second keeps both.
    _, again = sqlite_files.restore(tmp_path / "b.db", live, nothing)
    assert again is not None
    assert again != kept


async def test_the_log_of_a_killed_metering_is_kept_with_its_ledger(tmp_path: Path) -> None:
    live = tmp_path / "live"
    await filled(live)
    sqlite_files.backup(live / FILE_NAME, tmp_path / "b.db", nothing)
    # A connection that never closes leaves its log, as a killed process does.
    connection = sqlite3.connect(live / FILE_NAME, isolation_level=None)
    connection.execute("INSERT INTO accounts (name) VALUES ('key/lost')")
    assert (live / f"{FILE_NAME}-wal").stat().st_size
    _, kept = sqlite_files.restore(tmp_path / "b.db", live, nothing)
    assert kept is not None
    assert not (live / f"{FILE_NAME}-wal").exists()
    assert kept.with_name(f"{kept.name}-wal").stat().st_size
    connection.close()
    with contextlib.closing(sqlite3.connect(live / FILE_NAME)) as restored:
        assert restored.execute("SELECT COUNT(*) FROM accounts WHERE name = 'key/lost'").fetchone() == (0,)


async def test_what_is_wrong_is_not_restored_and_neither_is_anything_while_metering_runs(tmp_path: Path) -> None:
    live, good, bad = tmp_path / "live", tmp_path / "good.db", tmp_path / "bad.db"
    head = await filled(live)
    for target in (good, bad):
        sqlite_files.backup(live / FILE_NAME, target, nothing)
    damage(bad)
    with pytest.raises(LedgerFileError, match=r"bad\.db is not restored.*entry 1"):
        sqlite_files.restore(bad, live, nothing)
    async with open_store(live) as store:
        with pytest.raises(LedgerFileError, match="another metering process"):
            sqlite_files.restore(good, live, nothing)
        assert await store.head() == head
    assert [path.name for path in live.iterdir() if "restore" in path.name or path.name.startswith(".")] == []


@pytest.mark.parametrize("content", [b"", b"no database at all" * 100])
def test_what_is_no_ledger_is_told_from_one(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.db").write_bytes(content)
    with pytest.raises(LedgerFileError, match="is no ledger"):
        sqlite_files.verify_file(tmp_path / "x.db")
    with pytest.raises(LedgerFileError, match="is not there"):
        sqlite_files.verify_file(tmp_path)


async def test_a_ledger_in_a_directory_that_can_not_be_written_is_verified(tmp_path: Path) -> None:
    await filled(tmp_path / "live")
    sqlite_files.backup(tmp_path / "live" / FILE_NAME, tmp_path / "live" / "b.db", nothing)
    before = sorted(os.listdir(tmp_path / "live"))
    assert sqlite_files.verify_file(tmp_path / "live" / "b.db").entries == 3
    # No log is made beside it.
    assert sorted(os.listdir(tmp_path / "live")) == before


async def test_a_damaged_ledger_is_not_opened_and_the_error_says_what_to_do(tmp_path: Path) -> None:
    head = await filled(tmp_path)
    path = tmp_path / FILE_NAME
    data = bytearray(path.read_bytes())
    # The last row's own head, so that not even the last hash can be read.
    place = data.rindex(b"op-2/1", 0, data.index(head.hash))
    data[place - 30 : place] = b"\xff" * 30
    path.write_bytes(data)
    with pytest.raises(RuntimeError, match=r"damaged.*sluice ledger verify --file"):
        async with open_store(tmp_path):
            pass
    verdict = sqlite_files.verify_file(path, head)
    assert any("damaged" in problem for problem in verdict.problems)


async def test_a_head_of_nothing_is_that_of_an_empty_ledger(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        empty: Store = store
        verdict = await empty.verify(await empty.head())
    assert (verdict.head, verdict.entries, verdict.problems) == (Head(0, bytes(16)), 0, ())
