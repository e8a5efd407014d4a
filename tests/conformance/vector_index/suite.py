"""What every VectorIndex keeps to. An adapter's test derives from `VectorIndexSuite` and gives the fixtures `index` and `clock`."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from services.caching.ports import Record, Vector, VectorIndex

DIMENSIONS = 384
SCOPE = b"s" * 16
A, B = "a" * 32, "b" * 32


class Clock:
    """Unix time that a test sets."""

    def __init__(self) -> None:
        self.time = 1_700_000_000.0

    def __call__(self) -> float:
        return self.time


def vector(seed: int, toward: Vector | None = None, share: float = 0.0) -> Vector:
    """A direction of length 1; with `toward`, one whose cosine with it is about `share`."""
    drawn = np.random.default_rng(seed).standard_normal(DIMENSIONS)
    if toward is not None:
        drawn -= drawn.dot(toward) * toward
        drawn = drawn / np.linalg.norm(drawn) * np.sqrt(1 - share**2) + share * toward
    return (drawn / np.linalg.norm(drawn)).astype(np.float32)


def record(
    number: int,
    direction: Vector,
    *,
    partition: str = A,
    scope: bytes = SCOPE,
    namespace: str = "default",
    expire: float = 1_700_003_600.0,
) -> Record:
    """A record whose key, text and payload tell its number."""
    key = number.to_bytes(32, "big")
    return Record(
        partition, scope, key, namespace, direction, f"text {number}", f"payload {number}".encode(), 1_700_000_000.0, expire
    )


class VectorIndexSuite:
    """The contract."""

    @pytest.fixture
    def clock(self) -> Clock:
        return Clock()

    async def test_the_nearest_come_first_with_their_cosines_and_all_that_was_stored(self, index: VectorIndex) -> None:
        wanted = vector(0)
        for number, share in enumerate((0.5, 0.99, 0.9)):
            await index.upsert(record(number, vector(number + 1, wanted, share)))
        found = await index.search(A, SCOPE, wanted, 2)
        assert [match.text for match in found] == ["text 1", "text 2"]
        assert found[0].score == pytest.approx(0.99, abs=1e-4)
        assert found[1].score == pytest.approx(0.9, abs=1e-4)
        assert found[0].payload == b"payload 1"
        assert found[0].key == (1).to_bytes(32, "big")
        assert found[0].create_time == pytest.approx(1_700_000_000.0, abs=1e-3)

    async def test_nothing_crosses_a_partition_or_a_scope(self, index: VectorIndex) -> None:
        direction = vector(0)
        await index.upsert(record(1, direction))
        assert await index.search(B, SCOPE, direction, 5) == []
        assert await index.search(A, b"t" * 16, direction, 5) == []
        await index.upsert(record(1, direction, partition=B))
        assert len(await index.search(A, SCOPE, direction, 5)) == 1
        assert await index.delete(B) == 1
        assert len(await index.search(A, SCOPE, direction, 5)) == 1

    async def test_an_upsert_replaces_even_in_another_scope(self, index: VectorIndex) -> None:
        await index.upsert(record(1, vector(0)))
        await index.upsert(record(1, vector(1), scope=b"t" * 16))
        assert await index.count(A) == 1
        assert await index.search(A, SCOPE, vector(0), 5) == []
        (match,) = await index.search(A, b"t" * 16, vector(1), 5)
        assert match.score == pytest.approx(1.0, abs=1e-4)

    async def test_what_is_over_is_not_found(self, index: VectorIndex, clock: Clock) -> None:
        await index.upsert(record(1, vector(0), expire=clock() + 10))
        await index.upsert(record(2, vector(0), expire=clock() + 20))
        clock.time += 10
        assert [match.text for match in await index.search(A, SCOPE, vector(0), 1)] == ["text 2"]
        clock.time += 10
        assert await index.search(A, SCOPE, vector(0), 1) == []

    async def test_a_namespace_is_counted_and_removed_alone(self, index: VectorIndex) -> None:
        for number, namespace in enumerate(("x", "x", "y")):
            await index.upsert(record(number, vector(number), namespace=namespace))
        assert (await index.count(A), await index.count(A, "x"), await index.count(B)) == (3, 2, 0)
        assert await index.delete(A, "x") == 2
        assert (await index.count(A), await index.count(A, "x")) == (1, 0)
        assert await index.delete(A, "x") == 0
        assert [match.text for match in await index.search(A, SCOPE, vector(0), 5)] == ["text 2"]
        assert await index.delete(A) == 1
        assert await index.search(A, SCOPE, vector(0), 5) == []

    async def test_many_are_found_among_many(self, index: VectorIndex) -> None:
        # More than adapters compare on the event loop.
        for number in range(1200):
            await index.upsert(record(number, vector(number)))
        for number in (0, 599, 1199):
            (match,) = await index.search(A, SCOPE, vector(number), 1)
            assert match.text == f"text {number}"

    async def test_searches_and_changes_at_once_give_whole_answers(self, index: VectorIndex) -> None:
        directions = [vector(number) for number in range(60)]

        async def change() -> None:
            for number, direction in enumerate(directions):
                await index.upsert(record(number, direction))
                await asyncio.sleep(0)
            await index.delete(A)

        async def search() -> None:
            for direction in directions:
                for match in await index.search(A, SCOPE, direction, 3):
                    known = int(match.text.removeprefix("text "))
                    assert match.payload == f"payload {known}".encode()
                    assert match.score == pytest.approx(float(directions[known] @ direction), abs=1e-4)
                await asyncio.sleep(0)

        await asyncio.gather(change(), search(), search())
        assert await index.count(A) == 0

    async def test_no_limit_and_no_records_give_nothing(self, index: VectorIndex) -> None:
        assert await index.search(A, SCOPE, vector(0), 5) == []
        await index.upsert(record(1, vector(0)))
        assert await index.search(A, SCOPE, vector(0), 0) == []

    async def test_it_answers_a_ping(self, index: VectorIndex) -> None:
        await index.ping()
