from __future__ import annotations

from pathlib import Path

import pytest

from services.caching.adapters.numpy_index import Limits, open_index
from tests.conformance.vector_index.suite import SCOPE, A, B, Clock, record, vector

LIMITS = Limits(entries_per_partition=100, entries=1000, bytes=100_000_000)


async def test_entries_are_there_after_a_restart_but_not_those_that_are_over_or_purged(tmp_path: Path) -> None:
    clock = Clock()
    path = tmp_path / "semantic.sqlite"
    async with open_index(LIMITS, clock, path) as index:
        await index.upsert(record(1, vector(1)))
        await index.upsert(record(2, vector(2), expire=clock() + 10))
        await index.upsert(record(3, vector(3), partition=B))
        await index.upsert(record(4, vector(4), namespace="x"))
        await index.delete(A, "x")
        await index.delete(B)
    clock.time += 20
    async with open_index(LIMITS, clock, path) as index:
        assert len(index) == 1
        (match,) = await index.search(A, SCOPE, vector(1), 5)
        assert (match.text, match.payload) == ("text 1", b"payload 1")
        assert match.score == pytest.approx(1.0, abs=1e-5)


async def test_a_purge_is_in_the_file_before_it_is_confirmed(tmp_path: Path) -> None:
    clock = Clock()
    path = tmp_path / "semantic.sqlite"
    async with open_index(LIMITS, clock, path) as index:
        await index.upsert(record(1, vector(1)))
        await index.write()
        await index.delete(A)
        # Another process reads the file while the first one still runs, as after a kill.
        async with open_index(LIMITS, clock, path) as other:
            assert len(other) == 0


async def test_a_broken_file_is_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "semantic.sqlite"
    path.write_bytes(b"no database" * 1000)
    async with open_index(LIMITS, Clock(), path) as index:
        await index.upsert(record(1, vector(1)))
    async with open_index(LIMITS, Clock(), path) as index:
        assert len(index) == 1


async def test_a_tenant_keeps_its_newest_and_cannot_push_out_others(tmp_path: Path) -> None:
    limits = Limits(entries_per_partition=10, entries=12, bytes=100_000_000)
    path = tmp_path / "semantic.sqlite"
    async with open_index(limits, Clock(), path) as index:
        for number in range(3):
            await index.upsert(record(number, vector(number), partition=B))
        for number in range(30):
            await index.upsert(record(number, vector(number)))
        assert (await index.count(B), await index.count(A)) == (3, 9)
        (match,) = await index.search(A, SCOPE, vector(29), 1)
        assert match.text == "text 29"
    async with open_index(limits, Clock(), path) as index:
        assert (await index.count(B), await index.count(A)) == (3, 9)


async def test_bytes_are_bounded() -> None:
    limits = Limits(entries_per_partition=1000, entries=1000, bytes=70_000)
    async with open_index(limits, Clock(), None) as index:
        for number in range(50):
            await index.upsert(record(number, vector(number)))
            assert index.bytes <= 70_000
        assert 5 < len(index) < 12
        await index.delete(A)
        assert index.bytes == 0


async def test_a_sweep_removes_what_is_over() -> None:
    clock = Clock()
    async with open_index(LIMITS, clock, None) as index:
        for number in range(10):
            await index.upsert(record(number, vector(number), expire=clock() + number))
        clock.time += 4.5
        assert index.sweep() == 5
        assert len(index) == 5
        for number in range(5, 10):
            (match,) = await index.search(A, SCOPE, vector(number), 1)
            assert match.text == f"text {number}"
