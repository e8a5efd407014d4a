"""Kept answers of requests with a request id."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import nats
import pytest
from nats.aio.client import Client

from services.gateway.adapters.replays import BUCKET, NatsReplays, Settings
from services.gateway.core import Completion
from services.gateway.events import Opened
from services.gateway.operations import fingerprint
from services.gateway.replays import key_of, record_of, result_of
from services.runtime.errors import Failure, Reason, unavailable
from services.runtime.jetstream import KeyValue
from sluice.inference.v1 import inference_service_pb2
from tests.unit.gateway.fakes import PRINCIPAL, World, generate
from tests.unit.runtime.fakes import eventually
from tests.unit.runtime.test_link import free_port
from tests.unit.runtime.test_process import nats_server

MARK = fingerprint(b"body")
SETTINGS = Settings(
    max_bytes=200_000,
    max_entry_bytes=50_000,
    max_age=3600.0,
    replicas=1,
    read_timeout=1.0,
    write_timeout=1.0,
    max_waiting=4,
)


class Shared:
    """Kept answers that several gateways find."""

    def __init__(self) -> None:
        self.records: dict[str, bytes] = {}
        self.gate: asyncio.Event | None = None
        self.is_away = False

    async def find(self, key: str) -> bytes | None:
        return None if self.is_away else self.records.get(key)

    async def keep(self, key: str, record: bytes) -> bool:
        if self.gate is not None:
            await self.gate.wait()
        if not self.is_away:
            self.records[key] = record
        return not self.is_away


async def test_a_gateway_replays_what_another_one_has_answered() -> None:
    shared = Shared()
    one, two = World(replays=shared), World(replays=shared)
    request = generate(request_id="r1")
    first = await one.generate(request)
    again = await two.generate(request)
    assert not two.execution.asked("Complete")
    facts = [(c.operation_id, c.request_id, c.model, c.cost_nano_usd, c.created, c.cache_status) for c in (first, again)]
    assert facts[0] == facts[1]
    assert again.answer == first.answer
    assert again.receipt() == first.receipt()
    assert again.receipt().attempts
    # As a stream: the whole answer at once.
    events = await two.stream(request)
    assert isinstance(events[0], Opened)
    assert events[0].operation_id == first.operation_id
    assert events[-1].answer == first.answer
    assert not two.execution.asked("StreamComplete")


async def test_what_was_streamed_and_embedded_is_replayed_too() -> None:
    shared = Shared()
    one, two = World(replays=shared), World(replays=shared)
    streamed = await one.stream(generate(request_id="r1"))
    assert (await two.generate(generate(request_id="r1"))).operation_id == streamed[-1].operation_id
    request = inference_service_pb2.EmbedRequest(request_id="r2", model="a/one", inputs=["abc"])
    first = await one.core.embed(PRINCIPAL, request, deadline=one.soon())
    assert await two.core.embed(PRINCIPAL, request, deadline=two.soon()) == first
    assert not two.execution.calls


async def test_an_answer_is_kept_before_its_caller_has_all_of_it() -> None:
    shared = Shared()
    shared.gate = asyncio.Event()
    world = World(replays=shared)
    whole = asyncio.create_task(world.generate(generate(request_id="r1")))
    stream = world.core.stream(PRINCIPAL, generate(request_id="r2"), accepted_wire=0, deadline=world.soon())
    events: list[Any] = []

    async def read() -> None:
        events.extend([event async for event in stream])

    reading = asyncio.create_task(read())
    await asyncio.sleep(0.05)
    assert not whole.done()
    assert not any(isinstance(event, Completion) for event in events)
    shared.gate.set()
    await asyncio.gather(whole, reading)
    assert len(shared.records) == 2


async def test_another_body_is_refused_for_what_another_gateway_has_answered() -> None:
    shared = Shared()
    one, two = World(replays=shared), World(replays=shared)
    await one.generate(generate(request_id="r1"))
    with pytest.raises(Failure) as refused:
        await two.generate(generate("something else", request_id="r1"))
    assert refused.value.reason is Reason.REQUEST_ID_REUSED
    # The refusal isn't remembered in place of the answer.
    await two.generate(generate(request_id="r1"))
    assert not two.execution.asked("Complete")


async def test_what_failed_is_not_kept_and_runs_again() -> None:
    shared = Shared()
    one, two = World(replays=shared), World(replays=shared)
    one.execution.failures["Complete"] = unavailable("execution", "away")
    with pytest.raises(Failure):
        await one.generate(generate(request_id="r1"))
    assert not shared.records
    await two.generate(generate(request_id="r1"))
    assert len(two.execution.asked("Complete")) == 1


async def test_without_them_requests_go_on() -> None:
    shared = Shared()
    shared.is_away = True
    world = World(replays=shared)
    first = await world.generate(generate(request_id="r1"))
    assert (await world.generate(generate(request_id="r1"))).operation_id == first.operation_id


async def test_without_a_request_id_nothing_is_kept() -> None:
    shared = Shared()
    await World(replays=shared).generate(generate())
    assert not shared.records


@pytest.mark.parametrize("record", [b"", b"\x01", b"\x07" + bytes(32), b"\x01" + MARK + b"\xff\xff"])
def test_a_record_that_can_not_be_read_is_none(record: bytes) -> None:
    assert result_of(record, "r1", MARK) is None


def test_keys_of_two_scopes_never_meet() -> None:
    assert key_of("a/b", "c") != key_of("a", "b\0c")
    assert key_of("a", "\0b") != key_of("a\0", "b")
    assert len({key_of("a", "b"), key_of("ab", ""), key_of("", "ab"), key_of("a", "c")}) == 4


def test_an_embedding_is_read_as_it_was_kept() -> None:
    response = inference_service_pb2.EmbedResponse(operation_id="op", model="m")
    assert result_of(record_of(MARK, response), "r1", MARK) == response


# On a real server.


@contextlib.asynccontextmanager
async def running(url: str, settings: Settings = SETTINGS) -> AsyncIterator[tuple[NatsReplays, list[str]]]:
    warnings: list[str] = []
    client: list[Client] = []

    async def connect() -> Client:
        if not client:
            try:
                # As the process's own does: unavailable at once, and reconnecting for ever when it was connected.
                _, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
                writer.close()
                client.append(await nats.connect(url, max_reconnect_attempts=-1, reconnect_time_wait=0.1))
            except (OSError, nats.errors.Error):
                raise unavailable("nats", "NATS can't be reached") from None
        return client[0]

    replays = NatsReplays(settings, connect, clock=asyncio.get_running_loop().time, warn=warnings.append)
    work = asyncio.create_task(replays.run())
    try:
        yield replays, warnings
    finally:
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)
        for one in client:
            await one.close()


async def kept(replays: NatsReplays, key: str, record: bytes) -> None:
    async with asyncio.timeout(10):
        while not await replays.keep(key, record):
            await asyncio.sleep(0.02)


async def test_what_is_kept_is_found_by_others_and_after_a_restart_of_the_server(tmp_path: Path) -> None:
    port = free_port()
    url = f"nats://127.0.0.1:{port}"
    async with nats_server(port, tmp_path / "js"), running(url) as (one, _), running(url) as (two, _):
        await kept(one, "a" * 64, b"answer")
        await kept(two, "b" * 64, b"other")
        assert await two.find("a" * 64) == b"answer"
        assert await two.find("c" * 64) is None
    async with nats_server(port, tmp_path / "js"), running(url) as (three, _):
        await kept(three, "d" * 64, b"more")
        assert await three.find("a" * 64) == b"answer"
        assert three.found_count == 1


async def test_what_has_no_room_is_counted_and_what_was_confirmed_stays(tmp_path: Path) -> None:
    port = free_port()
    async with nats_server(port, tmp_path / "js"), running(f"nats://127.0.0.1:{port}") as (replays, _):
        await kept(replays, "0" * 64, bytes(40_000))
        before = replays.unkept_count
        assert not await replays.keep("1" * 64, bytes(50_001))
        results = []
        for number in range(2, 9):
            await asyncio.sleep(0)
            results.append(await replays.keep(f"{number}" * 64, bytes(40_000)))
            if not results[-1]:
                break
        assert results[-1] is False
        assert replays.unkept_count == before + 2
        # A refusal makes it rest; what was confirmed is there afterwards.
        await asyncio.sleep(1.1)
        assert await replays.find("0" * 64) == bytes(40_000)


async def test_behind_too_many_that_wait_nothing_is_kept(tmp_path: Path) -> None:
    port = free_port()
    async with nats_server(port, tmp_path / "js"), running(f"nats://127.0.0.1:{port}") as (replays, _):
        await kept(replays, "0" * 64, b"x")
        before = replays.unkept_count
        results = await asyncio.gather(*(replays.keep(f"{number:064x}", b"x") for number in range(20)))
        assert results.count(True) == SETTINGS.max_waiting
        assert replays.unkept_count == before + 16


async def test_while_nats_is_away_nothing_waits_for_it(tmp_path: Path) -> None:
    port = free_port()
    loop = asyncio.get_running_loop()
    async with running(f"nats://127.0.0.1:{port}") as (replays, warnings):
        began = loop.time()
        assert await replays.find("a" * 64) is None
        assert not await replays.keep("a" * 64, b"x")
        assert loop.time() - began < 0.05
        await eventually(lambda: len(warnings) == 1)
        async with nats_server(port, tmp_path / "js"):
            await kept(replays, "a" * 64, b"answer")
            assert await replays.find("a" * 64) == b"answer"
        await eventually(lambda: not replays._is_up())
        began = loop.time()
        for _ in range(50):
            assert await replays.find("a" * 64) is None
            assert not await replays.keep("a" * 64, b"x")
        assert loop.time() - began < 0.1
        async with nats_server(port, tmp_path / "js"):
            await kept(replays, "b" * 64, b"again")
            assert await replays.find("a" * 64) == b"answer"


async def test_a_server_that_hangs_is_waited_for_once_and_then_left_alone() -> None:
    class Hanging:
        is_connected = True

        def jetstream(self) -> Any:
            return self

        async def request(self, *_: Any, **__: Any) -> Any:
            await asyncio.sleep(60)

    client: Any = Hanging()
    replays = NatsReplays(
        SETTINGS, lambda: asyncio.sleep(60, client), clock=asyncio.get_running_loop().time, warn=lambda _: None
    )
    replays._client = client
    replays._reading = KeyValue(client, BUCKET, timeout=0.05)
    began = asyncio.get_running_loop().time()
    for _ in range(20):
        assert await replays.find("a" * 64) is None
    assert asyncio.get_running_loop().time() - began < 0.5
