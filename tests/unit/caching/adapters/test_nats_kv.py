from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import nats
import pytest

from services.caching.adapters.nats_kv import NatsSharedTier, Settings
from services.caching.keys import partition
from services.runtime.process import Process
from services.runtime.settings import MeshSettings
from tests.unit.caching.examples import answered
from tests.unit.runtime.fakes import Lines, eventually
from tests.unit.runtime.test_link import free_port
from tests.unit.runtime.test_process import nats_server

SETTINGS = Settings(
    bucket="cache",
    max_bytes=8 * 1024 * 1024,
    max_entry_bytes=100_000,
    max_age=3600,
    read_timeout=0.5,
    queue_entries=100,
    queue_bytes=1_000_000,
    known_keys=1000,
)
ACME = partition("acme")
KEY = b"k" * 32


@dataclass
class Replica:
    tier: NatsSharedTier
    purged: list[tuple[str, str]] = field(default_factory=list)
    warned: list[str] = field(default_factory=list)


@contextlib.asynccontextmanager
async def replica(name: str, port: int, settings: Settings = SETTINGS) -> AsyncIterator[Replica]:
    purged: list[tuple[str, str]] = []
    warned: list[str] = []
    async with Process(name, MeshSettings(nats_url=f"nats://127.0.0.1:{port}"), log=Lines()) as process:
        tier = NatsSharedTier(
            settings,
            process.nats,
            name,
            now=time.time,
            clock=time.monotonic,
            purged=lambda tenant, namespace: purged.append((tenant, namespace)),
            warn=warned.append,
        )
        worker = asyncio.create_task(tier.run())
        try:
            yield Replica(tier, purged, warned)
        finally:
            worker.cancel()
            await asyncio.wait([worker])


VALUE = answered().SerializeToString()


def put(
    tier: NatsSharedTier, key: bytes = KEY, *, namespace: str = "default", seconds: float = 100, value: bytes = VALUE
) -> bool:
    return tier.put(ACME, namespace, key, value, time.time() + seconds)


@pytest.fixture
async def port(tmp_path: Path) -> AsyncIterator[int]:
    port = free_port()
    async with nats_server(port, tmp_path / "js"):
        yield port


async def test_another_replica_hears_of_a_key_and_reads_it(port: int) -> None:
    async with replica("one", port) as one, replica("two", port) as two:
        await eventually(lambda: one.tier.is_ready and two.tier.is_ready)
        before = time.time()
        assert put(one.tier)
        await eventually(lambda: two.tier.knows(KEY))
        found = await two.tier.get(ACME, "default", KEY)
        assert found is not None
        assert found[0] == VALUE
        assert found[1] == pytest.approx(before + 100, abs=1)
        assert not one.tier.knows(KEY), "its own keys are in its own memory"
        assert await two.tier.get(partition("other"), "default", KEY) is None


async def test_a_replica_that_comes_later_knows_what_is_there(port: int) -> None:
    async with replica("one", port) as one:
        assert put(one.tier)
        await one.tier.flush(5)
        async with replica("two", port) as two:
            await eventually(lambda: two.tier.knows(KEY))
            assert await two.tier.get(ACME, "default", KEY) is not None


async def test_an_entry_ends_by_itself(port: int) -> None:
    async with replica("one", port) as one:
        assert put(one.tier, seconds=1.9)
        await one.tier.flush(5)
        assert await one.tier.get(ACME, "default", KEY) is not None
        await asyncio.sleep(2.1)
        assert await one.tier.get(ACME, "default", KEY) is None


async def test_a_purge_takes_one_namespace_everywhere(port: int) -> None:
    async with replica("one", port) as one, replica("two", port) as two:
        await eventually(lambda: one.tier.is_ready and two.tier.is_ready)
        put(one.tier, b"x" * 32, namespace="x")
        put(one.tier, b"y" * 32, namespace="y")
        await one.tier.flush(5)
        await two.tier.purge("acme", ACME, "x")
        assert await one.tier.get(ACME, "x", b"x" * 32) is None
        assert await one.tier.get(ACME, "y", b"y" * 32) is not None
        await eventually(lambda: one.purged == [("acme", "x")])
        assert two.purged == []
        await two.tier.purge("acme", ACME, "")
        assert await one.tier.get(ACME, "y", b"y" * 32) is None


async def test_writes_are_dropped_and_counted_when_too_many_wait() -> None:
    async with replica("one", free_port()) as one:
        accepted = [put(one.tier, number.to_bytes(32, "big")) for number in range(150)]
        assert accepted.count(True) == 100
        assert one.tier.dropped_count == 50
    async with replica("two", free_port()) as two:
        assert put(two.tier, value=bytes(100_000))
        assert not put(two.tier, value=bytes(100_001))
        assert [put(two.tier, value=bytes(100_000)) for _ in range(20)].count(True) == 9


async def test_known_keys_are_bounded(port: int) -> None:
    few = replace(SETTINGS, known_keys=5)
    async with replica("one", port) as one, replica("two", port, few) as two:
        await eventually(lambda: one.tier.is_ready and two.tier.is_ready)
        for number in range(20):
            put(one.tier, number.to_bytes(32, "big"))
        await eventually(lambda: two.tier.knows((19).to_bytes(32, "big")))
        assert sum(two.tier.knows(number.to_bytes(32, "big")) for number in range(20)) == 5


async def test_a_dead_server_costs_little_and_a_new_one_serves_again(tmp_path: Path) -> None:
    port = free_port()
    quick = replace(SETTINGS, read_timeout=0.05)
    async with replica("one", port, quick) as one:
        await eventually(lambda: bool(one.warned))
        began = time.perf_counter()
        assert await one.tier.get(ACME, "default", KEY) is None
        assert time.perf_counter() - began < 0.02
        async with nats_server(port, tmp_path / "one"):
            assert put(one.tier)
            await eventually(lambda: one.tier.is_ready, 10)
            await one.tier.flush(5)
            assert await one.tier.get(ACME, "default", KEY) is not None
        began = time.perf_counter()
        for _ in range(50):
            assert await one.tier.get(ACME, "default", KEY) is None
        assert time.perf_counter() - began < 0.5, "the breaker opens after three reads of 50 ms"


@pytest.mark.parametrize("payload", [b"", b"x" * 15, b"x" * 20, b"x" * 16 + b"[1", b"x" * 16 + b"{}", b"x" * 16 + b'["a"]'])
async def test_foreign_messages_are_harmless(port: int, payload: bytes) -> None:
    async with replica("one", port) as one:
        await eventually(lambda: one.tier.is_ready)
        stranger = await nats.connect(f"nats://127.0.0.1:{port}")
        for subject in ("sluice.caching.announced", "sluice.caching.purged"):
            await stranger.publish(subject, payload)
        await stranger.publish("sluice.caching.announced", b"y" * 16 + KEY)
        await stranger.flush()
        await eventually(lambda: one.tier.knows(KEY))
        assert one.purged == []
        await stranger.close()
